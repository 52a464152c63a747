// The depthwise convolution, forward and backward. A task slides down the rows of one image and tile of channels: a
// ring of `side` rows, activated once each, stays in the first level of cache.
#pragma once

#include "tiles.h"

namespace ceit::leff {
namespace CEIT_CAPABILITY {
namespace {

constexpr int kAhead = 4;  // columns of the result that are computed at once

// Rows of kTileChannels channels with `side / 2` columns of zeros on the left, and enough of them on the right.
template <class Acc>
class Ring {
 public:
  Ring(int side, int width)
      : side_(side), row_(int64_t(width + side - 1 + kAhead) * kTileChannels), rows_((side + 1) * row_) {}
  // Where column 0 of row `y` is written.
  Acc* write(int y) const { return rows_.get() + y % side_ * row_ + side_ / 2 * kTileChannels; }
  // Row `y` from its zeros on the left; zeros where it is outside of the image.
  const Acc* read(int y, int height) const { return rows_.get() + (y < 0 || y >= height ? side_ : y % side_) * row_; }

 private:
  int side_;
  int64_t row_;
  Scratch<Acc> rows_;
};

// line[x] = bias + sum of taps[dy, dx] * rows[dy][x + dx], for `width` columns rounded up to kAhead.
template <int side, class Acc>
CEIT_INLINE void convolve(const Acc* const* rows, const Vec<Acc>* taps, Vec<Acc> bias, Acc* line, int width) {
  for (int x = 0; x < width; x += kAhead) {
    Vec<Acc> sums[kAhead] = {bias, bias, bias, bias};
#pragma GCC unroll 8
    for (int dy = 0; dy < side; ++dy) {
#pragma GCC unroll 16
      for (int j = 0; j < kAhead + side - 1; ++j) {
        const Vec<Acc> value = load(rows[dy] + (x + j) * kTileChannels);
#pragma GCC unroll 8
        for (int dx = 0; dx < side; ++dx)
          if (j - dx >= 0 && j - dx < kAhead) sums[j - dx] += value * taps[dy * side + dx];
      }
    }
    for (int i = 0; i < kAhead; ++i) store(line + (x + i) * kTileChannels, sums[i]);
  }
}

template <class T, Activation kind>
void load_activated(const T* from, int64_t stride, const Norm<acc_t<T>>& norm, acc_t<T>* to, int width, int count) {
  using Acc = acc_t<T>;
  for (int x = 0; x < width; ++x) {
    __builtin_prefetch(from + (x + kPrefetch) * stride);
    store(to + x * kTileChannels, activate<kind, Acc>(norm(load(from + x * stride, count))));
  }
}

template <class T, Activation kind>
void store_activated(const acc_t<T>* line, T* to, int64_t stride, int width, int count) {
  using Acc = acc_t<T>;
  for (int x = 0; x < width; ++x) store(to + x * stride, activate<kind, Acc>(load(line + x * kTileChannels)), count);
}

template <class T, int side>
void depthwise_task(const DepthwiseCall& call, const Task& task, const Ring<acc_t<T>>& ring, acc_t<T>* line) {
  using Acc = acc_t<T>;
  const Shape& shape = call.shape;
  const int64_t channels = shape.channels;
  const int vectors = vectors_of<Acc>(task), width = call.width;
  const T* in = tokens_of<const T>(call.in, shape, task.image) + task.channel;
  const Shape part{shape.images, int64_t(call.bottom - call.top) * width, channels};
  T* out = tokens_of<T>(call.out, part, task.image) + task.channel;
  Moments<Acc> moments;
  for (int below = call.top < side / 2 ? 0 : call.top - side / 2; below < call.bottom + side / 2; ++below) {
    if (below < call.height) {
      for (int v = 0; v < vectors; ++v) {
        const Slice<Acc> s(task, v);
        const Norm<Acc> norm(call.norm, channels, task.channel + s.start, s.count);
        const T* from = in + int64_t(below) * width * channels + s.start;
        with_activation(call.first, [&](auto kind) {
          load_activated<T, decltype(kind)::value>(from, channels, norm, ring.write(below) + s.start, width, s.count);
        });
      }
    }
    const int y = below - side / 2;
    if (y < call.top) continue;
    for (int v = 0; v < vectors; ++v) {
      const Slice<Acc> s(task, v);
      Vec<Acc> taps[side * side];
      for (int i = 0; i < side * side; ++i)
        taps[i] = load(static_cast<const Acc*>(call.taps) + i * channels + task.channel + s.start, s.count);
      const Acc* bias = static_cast<const Acc*>(call.bias);
      const Acc* rows[side];
      for (int dy = 0; dy < side; ++dy) rows[dy] = ring.read(y + dy - side / 2, call.height) + s.start;
      convolve<side, Acc>(rows, taps, bias ? load(bias + task.channel + s.start, s.count) : splat(Acc(0)),
                          line + s.start, width);
      T* to = out + int64_t(y - call.top) * width * channels + s.start;
      with_activation(call.second, [&](auto kind) {
        store_activated<T, decltype(kind)::value>(line + s.start, to, channels, width, s.count);
      });
      // The norm is of what is stored: where a mean is many deviations, its rounding is a shift.
      if constexpr (!std::is_same_v<T, Acc>)
        if (call.moments)
          for (int x = 0; x < width; ++x) store(line + s.start + x * kTileChannels, load(to + x * channels, s.count));
    }
    if (call.moments) moments.add(line, width, vectors);
  }
  if (call.moments) moments.write(call.moments, shape, task);
}

// Sums over the image of one vector of channels.
template <int side, class Acc>
struct BackwardSums {
  Vec<Acc> taps[side * side] = {};
  Vec<Acc> g = {}, centred = {};
};

template <int side, class Acc>
CEIT_INLINE void add_tap_sums(const Acc* const* rows, const Acc* dz, Vec<Acc>* taps, int width) {
  Vec<Acc> sums[side * side] = {};
  for (int x = 0; x < width; ++x) {
    const auto d = load(dz + x * kTileChannels);
#pragma GCC unroll 8
    for (int dy = 0; dy < side; ++dy)
#pragma GCC unroll 8
      for (int dx = 0; dx < side; ++dx) sums[dy * side + dx] += d * load(rows[dy] + (x + dx) * kTileChannels);
  }
  for (int i = 0; i < side * side; ++i) taps[i] += sums[i];
}

// The rings of one task of backward: the gradient of z2, the activated input, and the slope of its activation.
template <class Acc>
struct BackwardRings {
  Ring<Acc> dz, a, slope;
  BackwardRings(int side, int width) : dz(side, width), a(side, width), slope(side, width) {}
};

template <class T, Activation kind>
void load_with_slope(const T* from, int64_t stride, const Norm<acc_t<T>>& norm, acc_t<T>* to, acc_t<T>* slopes,
                     int width, int count) {
  using Acc = acc_t<T>;
  for (int x = 0; x < width; ++x) {
    __builtin_prefetch(from + (x + kPrefetch) * stride);
    const auto both = activate_with_slope<kind, Acc>(norm(load(from + x * stride, count)));
    store(to + x * kTileChannels, both.value);
    store(slopes + x * kTileChannels, both.slope);
  }
}

template <class T, int side>
void backward_load(const DepthwiseBackwardCall& call, const Task& task, const BackwardRings<acc_t<T>>& rings, int y) {
  using Acc = acc_t<T>;
  const Shape& shape = call.shape;
  const int64_t channels = shape.channels, row = int64_t(y) * call.width * channels + task.channel;
  const T* g2 = tokens_of<const T>(call.g, shape, task.image) + row;
  const T* z2 = tokens_of<const T>(call.z2, shape, task.image) + row;
  const T* z1 = tokens_of<const T>(call.z1, shape, task.image) + row;
  for (int v = 0; v < vectors_of<Acc>(task); ++v) {
    const Slice<Acc> s(task, v);
    const Gradient<Acc> gradient(call.gradient2, channels, task.channel + s.start, s.count);
    Acc* dz = rings.dz.write(y) + s.start;
    for (int x = 0; x < call.width; ++x) {
      const int64_t at = x * channels + s.start;
      __builtin_prefetch(g2 + at + kPrefetch * channels);
      __builtin_prefetch(z2 + at + kPrefetch * channels);
      store(dz + x * kTileChannels, gradient(load(g2 + at, s.count), load(z2 + at, s.count)));
    }
    const Norm<Acc> norm(call.norm1, channels, task.channel + s.start, s.count);
    with_activation(call.first, [&](auto kind) {
      load_with_slope<T, decltype(kind)::value>(z1 + s.start, channels, norm, rings.a.write(y) + s.start,
                                                rings.slope.write(y) + s.start, call.width, s.count);
    });
  }
}

template <class T, int side>
void backward_task(const DepthwiseBackwardCall& call, const Task& task, const BackwardRings<acc_t<T>>& rings,
                   acc_t<T>* line, BackwardSums<side, acc_t<T>>* sums) {
  using Acc = acc_t<T>;
  const Shape& shape = call.shape;
  const int64_t channels = shape.channels;
  const int vectors = vectors_of<Acc>(task), width = call.width;
  for (int v = 0; v < vectors; ++v) sums[v] = {};
  for (int below = 0; below < call.height + side / 2; ++below) {
    if (below < call.height) backward_load<T, side>(call, task, rings, below);
    const int y = below - side / 2;
    if (y < 0) continue;
    const int64_t row = int64_t(y) * width * channels + task.channel;
    const T* z1 = tokens_of<const T>(call.z1, shape, task.image) + row;
    T* g1 = tokens_of<T>(call.g, shape, task.image) + row;
    for (int v = 0; v < vectors; ++v) {
      const Slice<Acc> s(task, v);
      BackwardSums<side, Acc>& sum = sums[v];
      Vec<Acc> flipped[side * side];  // the transposed convolution's taps
      for (int i = 0; i < side * side; ++i)
        flipped[side * side - 1 - i] =
            load(static_cast<const Acc*>(call.taps) + i * channels + task.channel + s.start, s.count);
      const Acc *dz_rows[side], *a_rows[side];
      for (int dy = 0; dy < side; ++dy) {
        dz_rows[dy] = rings.dz.read(y + dy - side / 2, call.height) + s.start;
        a_rows[dy] = rings.a.read(y + dy - side / 2, call.height) + s.start;
      }
      convolve<side, Acc>(dz_rows, flipped, splat(Acc(0)), line + s.start, width);
      const Acc* dz = rings.dz.write(y) + s.start;
      if (call.grad_taps) add_tap_sums<side, Acc>(a_rows, dz, sum.taps, width);
      const Acc* slope = rings.slope.write(y) + s.start;
      const Norm<Acc> norm(call.norm1, channels, task.channel + s.start, s.count);
      for (int x = 0; x < width; ++x) {
        const auto g = load(line + s.start + x * kTileChannels) * load(slope + x * kTileChannels);
        const int64_t at = x * channels + s.start;
        store(g1 + at, g, s.count);
        sum.g += g;
        sum.centred += g * (load(z1 + at, s.count) - norm.mean);
      }
    }
  }
  for (int v = 0; v < vectors; ++v) {
    const Slice<Acc> s(task, v);
    if (call.sums1) {
      store(sum_row<Acc>(call.sums1, shape, task, 2, 0) + s.start, sums[v].g, s.count);
      store(sum_row<Acc>(call.sums1, shape, task, 2, 1) + s.start, sums[v].centred, s.count);
    }
    for (int i = 0; call.grad_taps && i < side * side; ++i)
      store(sum_row<Acc>(call.grad_taps, shape, task, side * side, i) + s.start, sums[v].taps[i], s.count);
  }
  for (int64_t row = shape.tokens - call.g.rows; row < 0; ++row)  // the prefix tokens
    std::memset(static_cast<void*>(tokens_of<T>(call.g, shape, task.image) + row * channels + task.channel), 0,
                sizeof(T) * size_t(task.channels));
}

template <class T, int side>
void run_depthwise(const DepthwiseCall& call, int64_t begin, int64_t end) {
  const Ring<acc_t<T>> ring(side, call.width);
  const Scratch<acc_t<T>> line(int64_t(call.width + kAhead) * kTileChannels);
  for (int64_t i = begin; i < end; ++i) depthwise_task<T, side>(call, Task(call.shape, i), ring, line.get());
}

template <class T, int side>
void run_backward(const DepthwiseBackwardCall& call, int64_t begin, int64_t end) {
  const BackwardRings<acc_t<T>> rings(side, call.width);
  const Scratch<acc_t<T>> line(int64_t(call.width + kAhead) * kTileChannels);
  const Scratch<BackwardSums<side, acc_t<T>>> sums(kTileChannels / Lanes<acc_t<T>>::count);
  for (int64_t i = begin; i < end; ++i)
    backward_task<T, side>(call, Task(call.shape, i), rings, line.get(), sums.get());
}

}  // namespace

template <class T>
void depthwise(const DepthwiseCall& call, int64_t begin, int64_t end) {
  (call.side == 3 ? run_depthwise<T, 3> : call.side == 5 ? run_depthwise<T, 5> : run_depthwise<T, 7>)(call, begin, end);
}

template <class T>
void depthwise_backward(const DepthwiseBackwardCall& call, int64_t begin, int64_t end) {
  (call.side == 3 ? run_backward<T, 3> : call.side == 5 ? run_backward<T, 5> : run_backward<T, 7>)(call, begin, end);
}

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::leff
