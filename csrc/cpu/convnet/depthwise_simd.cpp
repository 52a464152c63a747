// A depthwise convolution of one row of a map whose channels lie side by side: a few pixels at a time, whose sums stay
// in registers while all taps pass.
#include "../activations.h"
#include "calls.h"

namespace ceit::convnet::depthwise {
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
void convolve_map(const DepthwiseCall& call, int64_t begin, int64_t end) {
  if (call.side == 3) convolve_side<T, 3>(call, begin, end);
  if (call.side == 5) convolve_side<T, 5>(call, begin, end);
  if (call.side == 7) convolve_side<T, 7>(call, begin, end);
}

}  // namespace

extern const Kernel<DepthwiseCall> kernels[3] = {convolve_map<float>, convolve_map<Bf16>, convolve_map<double>};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::convnet::depthwise
