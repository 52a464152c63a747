// A depthwise convolution of one row of a map whose channels lie side by side: a few pixels at a time, whose sums stay
// in registers while all taps pass.
#include "../activations.h"
#include "calls.h"

namespace ceit::convnet {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

namespace {

constexpr int kPixels = 4;  // of the result that are computed at once where no tap lies outside of the map

// Pixels of the result from `x` on; with one pixel taps may lie outside of the map, left or right.
template <class T, int side, int stride, int pixels>
CEIT_INLINE void convolve(const DepthwiseCall& call, int64_t x, T* out) {
  using Acc = acc_t<T>;
  constexpr int columns = (pixels - 1) * stride + side;
  const int64_t channels = call.channels, first = x * stride - call.padding;
  for_vectors<Acc>(channels, [&](int64_t c, auto count) {
    Vec<Acc> sums[pixels];
    for (int i = 0; i < pixels; ++i) sums[i] = load(static_cast<const Acc*>(call.shift) + c, count);
    const Acc* at = static_cast<const Acc*>(call.taps) + c;
#pragma GCC unroll 8
    for (int dy = 0; dy < side; ++dy) {
      const T* row = static_cast<const T*>(call.rows[dy]);
      if (row == nullptr) continue;
      row += first * channels + c;
      Vec<Acc> taps[side];
#pragma GCC unroll 8
      for (int dx = 0; dx < side; ++dx) taps[dx] = load(at + (dy * side + dx) * channels, count);
#pragma GCC unroll 16
      for (int j = 0; j < columns; ++j) {
        if (pixels == 1 && (first + j < 0 || first + j >= call.width)) continue;
        const Vec<Acc> value = load(row + j * channels, count);
#pragma GCC unroll 4
        for (int i = 0; i < pixels; ++i)
          if (j - i * stride >= 0 && j - i * stride < side) sums[i] += value * taps[j - i * stride];
      }
    }
    with_activation(call.activation, [&](auto kind) {
      for (int i = 0; i < pixels; ++i)
        store(out + i * channels + c, activate<decltype(kind)::value, Acc>(sums[i]), count);
    });
  });
}

template <class T, int side, int stride>
void convolve_row(const DepthwiseCall& call, int64_t begin, int64_t end) {
  T* out = static_cast<T*>(call.out);
  for (int64_t x = begin; x < end;) {
    const int64_t first = x * stride - call.padding, last = first + (kPixels - 1) * stride + side;
    const bool inside = x + kPixels <= end && first >= 0 && last <= call.width;
    if (inside)
      convolve<T, side, stride, kPixels>(call, x, out);
    else
      convolve<T, side, stride, 1>(call, x, out);
    const int pixels = inside ? kPixels : 1;
    x += pixels, out += pixels * call.channels;
  }
}

template <class T, int side>
void convolve_side(const DepthwiseCall& call, int64_t begin, int64_t end) {
  if (call.stride == 1)
    convolve_row<T, side, 1>(call, begin, end);
  else
    convolve_row<T, side, 2>(call, begin, end);
}

template <class T>
void depthwise(const DepthwiseCall& call, int64_t begin, int64_t end) {
  if (call.side == 3) convolve_side<T, 3>(call, begin, end);
  if (call.side == 5) convolve_side<T, 5>(call, begin, end);
  if (call.side == 7) convolve_side<T, 7>(call, begin, end);
}

template <class T>
void activate_elements(const ActivateCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  T* data = static_cast<T*>(call.data);
  with_activation(call.activation, [&](auto kind) {
    for_vectors<Acc>(begin, end, [&](int64_t i, auto count) {
      store(data + i, activate<decltype(kind)::value, Acc>(load(data + i, count)), count);
    });
  });
}

template <class T>
void sum(const SumCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  Acc* sums = static_cast<Acc*>(call.sums);
  for (int64_t i = begin; i < end; ++i) {
    const T* row = static_cast<const T*>(call.rows) + i * call.channels;
    for_vectors<Acc>(call.channels, [&](int64_t c, auto count) {
      store(sums + c, (i == begin ? splat(Acc(0)) : load(sums + c, count)) + load(row + c, count), count);
    });
  }
}

template <class T>
void gate(const GateCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  for_vectors<Acc>(begin, end, [&](int64_t c, auto count) {
    const Vec<Acc> x = load(static_cast<const T*>(call.x) + c, count);
    const Vec<Acc> hard = smaller<Acc>(larger<Acc>(x + Acc(3), splat(Acc(0))), splat(Acc(6))) * (Acc(1) / Acc(6));
    store(static_cast<Acc*>(call.gates) + c, call.hard ? hard : sigmoid<Acc>(x), count);
  });
}

template <class T>
void scale(const ScaleCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const T* row = static_cast<const T*>(call.rows) + i * call.channels;
    T* out = static_cast<T*>(call.out) + i * call.channels;
    for_vectors<Acc>(call.channels, [&](int64_t c, auto count) {
      store(out + c, load(row + c, count) * load(static_cast<const Acc*>(call.gates) + c, count), count);
    });
  }
}

template <class T>
constexpr Kernels kernels_of() {
  return {depthwise<T>, activate_elements<T>, sum<T>, gate<T>, scale<T>};
}

}  // namespace

extern const Kernels kernels[3] = {kernels_of<float>(), kernels_of<Bf16>(), kernels_of<double>()};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::convnet
