// Statistics of the convolution's result: count, mean and centred sum of squares, merged pairwise as by Chan, Golub and
// LeVeque (1979). A difference of large sums of squares never occurs.
#pragma once

#include "problem.h"

namespace ceit::i2t {

template <class Real>
struct Moments {
  Real* count;    // (rows,)
  Real* mean;     // (rows, O)
  Real* squares;  // (rows, O): sum of squared distances from the mean
};

template <class Real>
DEVICE void merge(Real& count, Real& mean, Real& squares, Real count2, Real mean2, Real squares2) {
  const Real total = count + count2, share = total > Real(0) ? count2 / total : Real(0), delta = mean2 - mean;
  // A side without elements has no mean to compare with.
  const bool both = count > Real(0) && count2 > Real(0);
  mean = both ? mean + delta * share : (count2 > Real(0) ? mean2 : mean);
  squares += squares2 + (both ? delta * delta * count * share : Real(0));
  count = total;
}

// What a thread has seen of its 4 channels.
template <class Real>
struct Accumulated {
  Real count = 0, mean[kOwn] = {}, squares[kOwn] = {};

  // Two rows of two columns; a column that does not count is left out, and so is the second row if it is not `below`.
  DEVICE void add(const Real (&first)[2][4], const Real (&second)[2][4], const bool (&counts)[2], bool below) {
    const Real n = Real(counts[0] + counts[1]) * Real(below ? 2 : 1);
    if (n == Real(0)) return;
    const Real inverse = Real(1) / n, share = n / (count + n), weight = count * share;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const Real v[4] = {first[c / 2][c % 2], first[c / 2][c % 2 + 2], second[c / 2][c % 2], second[c / 2][c % 2 + 2]};
      const bool in[4] = {counts[0], counts[1], counts[0] && below, counts[1] && below};
      Real sum = 0, square = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += in[i] ? v[i] : Real(0);
      const Real local = sum * inverse;
#pragma unroll
      for (int i = 0; i < 4; ++i) square += in[i] ? (v[i] - local) * (v[i] - local) : Real(0);
      const Real delta = local - mean[c];
      mean[c] += delta * share;
      squares[c] += square + delta * delta * weight;
    }
    count += n;
  }

  DEVICE void write(const Moments<Real>& moments, int64_t row, int channel, int out_channels) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) {
      const Real other = shuffle_xor(count, offset);
      Real total = count;
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

constexpr int kMergeThreads = 128;

// One block for each channel; `gamma` takes the sign back out.
template <class Real>
KERNEL(kMergeThreads, 1)
merge_moments(Moments<Real> moments, int rows, const Real* gamma, Real* mean_out, Real* variance_out) {
  SHARED_MEMORY(memory);
  Real* shared = reinterpret_cast<Real*>(memory);  // (3, kMergeThreads)
  const int channel = blockIdx.x, channels = gridDim.x, thread = threadIdx.x;
  Real count = 0, mean = 0, squares = 0;
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
    mean_out[channel] = gamma && gamma[channel] < Real(0) ? -mean : mean;
    variance_out[channel] = squares / count;
  }
}

constexpr int kNormaliseThreads = 256;

// BatchNorm of the pooled raw values, in place; `size` elements, channels innermost.
template <class Output, class Real>
KERNEL(kNormaliseThreads, 1)
normalise(Output* out, int64_t size, int channels, Norm<Real> norm) {
  constexpr int kPack = 16 / sizeof(Output);
  using Values = Pack<Output, kPack>;
  const int64_t stride = int64_t(gridDim.x) * kNormaliseThreads * kPack;  // a multiple of the channels
  int64_t i = (int64_t(blockIdx.x) * kNormaliseThreads + threadIdx.x) * kPack;
  const int channel = int(i % channels);
  Real sign[kPack], mean[kPack], scale[kPack], shift[kPack];
#pragma unroll
  for (int c = 0; c < kPack; ++c) {
    sign[c] = norm.sign(channel + c);
    mean[c] = norm.mean[channel + c];
    scale[c] = norm.inverse_deviation(channel + c) * norm.scale(channel + c);
    shift[c] = norm.beta ? norm.beta[channel + c] : Real(0);
  }
  for (; i < size; i += stride) {
    Values values = *reinterpret_cast<const Values*>(out + i);
#pragma unroll
    for (int c = 0; c < kPack; ++c)
      values.value[c] = convert<Output>((to_float(values.value[c]) * sign[c] - mean[c]) * scale[c] + shift[c]);
    *reinterpret_cast<Values*>(out + i) = values;
  }
}

}  // namespace ceit::i2t
