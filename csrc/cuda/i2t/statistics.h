// Statistics of the convolution's result: count, mean and centred sum of squares, merged pairwise as by Chan, Golub and
// LeVeque (1979). A difference of large sums of squares never occurs.
#pragma once

#include "problem.h"

namespace ceit::i2t {

template <class Acc>
struct Moments {
  Acc* count;    // (rows,)
  Acc* mean;     // (rows, O)
  Acc* squares;  // (rows, O): sum of squared distances from the mean
};

template <class Acc>
DEVICE void merge(Acc& count, Acc& mean, Acc& squares, Acc count2, Acc mean2, Acc squares2) {
  const Acc total = count + count2, share = total > Acc(0) ? count2 / total : Acc(0), delta = mean2 - mean;
  // A side without elements has no mean to compare with.
  const bool both = count > Acc(0) && count2 > Acc(0);
  mean = both ? mean + delta * share : (count2 > Acc(0) ? mean2 : mean);
  squares += squares2 + (both ? delta * delta * count * share : Acc(0));
  count = total;
}

// What a thread has seen of its 4 channels.
template <class Acc>
struct Accumulated {
  Acc count = 0, mean[kOwn] = {}, squares[kOwn] = {};

  // Two rows of two columns; a column that does not count is left out, and so is the second row if it is not `below`.
  DEVICE void add(const Acc (&first)[2][4], const Acc (&second)[2][4], const bool (&counts)[2], bool below) {
    const Acc n = Acc(counts[0] + counts[1]) * Acc(below ? 2 : 1);
    if (n == Acc(0)) return;
    const Acc inverse = Acc(1) / n, share = n / (count + n), weight = count * share;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const Acc v[4] = {first[c / 2][c % 2], first[c / 2][c % 2 + 2], second[c / 2][c % 2], second[c / 2][c % 2 + 2]};
      const bool in[4] = {counts[0], counts[1], counts[0] && below, counts[1] && below};
      Acc sum = 0, square = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += in[i] ? v[i] : Acc(0);
      const Acc local = sum * inverse;
#pragma unroll
      for (int i = 0; i < 4; ++i) square += in[i] ? (v[i] - local) * (v[i] - local) : Acc(0);
      const Acc delta = local - mean[c];
      mean[c] += delta * share;
      squares[c] += square + delta * delta * weight;
    }
    count += n;
  }

  DEVICE void write(const Moments<Acc>& moments, int64_t row, int channel, int out_channels) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) {
      const Acc other = shuffle_xor(count, offset);
      Acc total = count;
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        total = count;
        merge(total, mean[c], squares[c], other, shuffle_xor(mean[c], offset), shuffle_xor(squares[c], offset));
      }
      count = total;
    }
    if (lane >= 4) return;
    if (channel == 0) moments.count[row] = count;
    for (int c = 0; c < kOwn; ++c) {
      moments.mean[row * out_channels + channel + c] = mean[c];
      moments.squares[row * out_channels + channel + c] = squares[c];
    }
  }
};

// The statistics that BatchNorm keeps, in Acc or as the result is stored; none if the mean is null.
template <class Output, class Acc>
struct Running {
  void *mean, *variance;  // (O,)
  int64_t* batches;       // how many were averaged, or null
  bool in_acc;
  Acc keep, mean_share, variance_share;  // weights of the old statistics and of a batch's mean and biased variance

  DEVICE void average(int channel, Acc batch_mean, Acc batch_variance) const {
    if (in_acc) {
      average_as(static_cast<Acc*>(mean) + channel, mean_share * batch_mean);
      average_as(static_cast<Acc*>(variance) + channel, variance_share * batch_variance);
    } else {
      average_as(static_cast<Output*>(mean) + channel, mean_share * batch_mean);
      average_as(static_cast<Output*>(variance) + channel, variance_share * batch_variance);
    }
    if (batches && channel == 0) *batches += 1;
  }

  template <class T>
  DEVICE void average_as(T* old, Acc share) const {
    *old = convert<T>(keep * to_float(*old) + share);
  }
};

constexpr int kMergeThreads = 128;

// One block for each channel; `gamma` takes the sign back out.
template <class Output, class Acc>
KERNEL(kMergeThreads, 1)
merge_moments(Moments<Acc> moments, int rows, const Acc* gamma, Acc* mean_out, Acc* variance_out,
              Running<Output, Acc> running) {
  SHARED_MEMORY(memory);
  Acc* shared = reinterpret_cast<Acc*>(memory);  // (3, kMergeThreads)
  const int channel = blockIdx.x, channels = gridDim.x, thread = threadIdx.x;
  Acc count = 0, mean = 0, squares = 0;
  for (int row = thread; row < rows; row += kMergeThreads) {
    const int64_t at = int64_t(row) * channels + channel;
    merge(count, mean, squares, moments.count[row], moments.mean[at], moments.squares[at]);
  }
  for (int half = kMergeThreads / 2; half > 0; half /= 2) {
    shared[thread] = count;
    shared[kMergeThreads + thread] = mean;
    shared[2 * kMergeThreads + thread] = squares;
    barrier();
    if (thread < half) {
      const int other = thread + half;
      merge(count, mean, squares, shared[other], shared[kMergeThreads + other], shared[2 * kMergeThreads + other]);
    }
    barrier();
  }
  if (thread == 0) {
    mean = gamma && gamma[channel] < Acc(0) ? -mean : mean;
    mean_out[channel] = mean;
    variance_out[channel] = squares / count;
    if (running.mean) running.average(channel, mean, squares / count);
  }
}

constexpr int kNormaliseThreads = 256;

// BatchNorm of the pooled raw values, in place; `size` elements, channels innermost.
template <class Output, class Acc>
KERNEL(kNormaliseThreads, 1)
normalise(Output* out, int64_t size, int channels, Norm<Acc> norm) {
  constexpr int kPack = 16 / sizeof(Output);
  using Values = Pack<Output, kPack>;
  const int64_t stride = int64_t(gridDim.x) * kNormaliseThreads * kPack;  // a multiple of the channels
  int64_t i = (int64_t(blockIdx.x) * kNormaliseThreads + threadIdx.x) * kPack;
  const int channel = int(i % channels);
  Affine<Acc> norms[kPack];
#pragma unroll
  for (int c = 0; c < kPack; ++c) norms[c] = norm.affine(channel + c);
  for (; i < size; i += stride) {
    Values values = *reinterpret_cast<const Values*>(out + i);
#pragma unroll
    for (int c = 0; c < kPack; ++c) values.value[c] = convert<Output>(norms[c].apply(to_float(values.value[c])));
    *reinterpret_cast<Values*>(out + i) = values;
  }
}

}  // namespace ceit::i2t
