// A convolution of a few channels, such as a picture's: a tile of pixels and columns of the result stays in registers
// while the pixels that they meet are read where they lie.
#include "../activations.h"
#include "../scalar.h"
#include "calls.h"

namespace ceit::convnet::direct {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

namespace {

// Sums of a tile: vectors in registers, and those of columns at most.
constexpr int kSums = kVectorBytes == 64 ? 24 : 12, kMostVectors = 2;
// From one pixel to the next where the stride of a picture's pixels of three channels is 2.
constexpr int kPictureStep = 6;

template <class T, int pixels, int vectors, class Step, class Columns>
CEIT_INLINE void convolve(const DirectCall& call, Step step, int64_t first, int64_t c, Columns columns) {
  using Acc = acc_t<T>;
  constexpr int lanes = Lanes<Acc>::count;
  const auto load_row = [&](const void* from, Vec<Acc>(&to)[vectors]) {
    for (int v = 0; v < vectors; ++v) to[v] = load(static_cast<const Acc*>(from) + c + v * lanes, columns - v * lanes);
  };
  Vec<Acc> sums[pixels][vectors], row[vectors];
  load_row(call.shift, row);
#pragma GCC unroll 24
  for (int p = 0; p < pixels; ++p)
    for (int v = 0; v < vectors; ++v) sums[p][v] = row[v];
  const Acc* weights = static_cast<const Acc*>(call.weights);
  for (int dy = 0; dy < call.side; ++dy) {
    const T* at = static_cast<const T*>(call.rows[dy]) + first * step;
    for (int64_t k = 0; k < call.line; ++k, weights += call.columns) {
      load_row(weights, row);
#pragma GCC unroll 24
      for (int p = 0; p < pixels; ++p) {
        const auto factor = splat(Acc(value_of(at[p * step + k])));
        for (int v = 0; v < vectors; ++v) sums[p][v] += factor * row[v];
      }
    }
  }
  T* out = static_cast<T*>(call.out) + first * call.columns + c;
  with_activation(call.activation, [&](auto kind) {
    for (int p = 0; p < pixels; ++p)
      for (int v = 0; v < vectors; ++v)
        store(out + p * call.columns + v * lanes, activate<decltype(kind)::value, Acc>(sums[p][v]),
              columns - v * lanes);
  });
}

// Tiles of pixels, the last of which may overlap the one before; single pixels where there are fewer.
template <class T, int vectors, class Columns>
void convolve_columns(const DirectCall& call, int64_t begin, int64_t end, int64_t c, Columns columns) {
  constexpr int pixels = kSums / vectors;
  if (end - begin < pixels)
    for (int64_t x = begin; x < end; ++x) convolve<T, 1, vectors>(call, call.step, x, c, columns);
  else
    for (int64_t x = begin; x < end; x += pixels) {
      const int64_t first = min_of(x, end - pixels);
      if (call.step == kPictureStep)
        convolve<T, pixels, vectors>(call, Count<kPictureStep>(), first, c, columns);
      else
        convolve<T, pixels, vectors>(call, call.step, first, c, columns);
    }
}

template <class T>
void convolve_pixels(const DirectCall& call, int64_t begin, int64_t end) {
  constexpr int lanes = Lanes<acc_t<T>>::count, width = kMostVectors * lanes;
  for (int64_t c = 0; c < call.columns; c += width) {
    const int columns = int(min_of(call.columns - c, int64_t(width)));
    if (columns == width)
      convolve_columns<T, kMostVectors>(call, begin, end, c, Count<width>());
    else if (columns > lanes)
      convolve_columns<T, kMostVectors>(call, begin, end, c, columns);
    else if (columns == lanes)
      convolve_columns<T, 1>(call, begin, end, c, Count<lanes>());
    else
      convolve_columns<T, 1>(call, begin, end, c, columns);
  }
}

}  // namespace

extern const Kernel<DirectCall> kernels[3] = {convolve_pixels<float>, convolve_pixels<Bf16>, convolve_pixels<double>};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::convnet::direct
