// The gradient of the image: the convolution's gradient, formed tile by tile, goes back through the kernel.
#pragma once

#include "backward.h"

namespace ceit::i2t {

// A tile of 14 x 16 outputs of the convolution holds all that 20 rows and 24 columns of the image depend on.
constexpr int kGradientRows = 20, kGradientColumns = 24;

template <class Mma>
struct ImageGradientArguments {
  using Acc = typename Mma::Acc;
  const Acc* weight;    // (O, C, 7, 7)
  Gradients<Acc> sums;  // of gamma and beta, finished
  Acc count;            // outputs of the convolution for each channel
};

template <class Mma, class In, bool kDense>
KERNEL(kBackwardThreads<Mma>, 1)
image_gradient_kernel(Problem p, const In* image, BackwardArguments<Mma> a, ImageGradientArguments<Mma> g,
                      In* gradient) {
  using Acc = typename Mma::Acc;
  using Element = typename Mma::Element;
  SHARED_MEMORY(memory);
  Element* image_tile = reinterpret_cast<Element*>(memory);
  Element* gradient_tile = image_tile + kTileImageElements;
  Element* normalised_tile = gradient_tile + kOperandElements<Mma>;
  Acc* norms = reinterpret_cast<Acc*>(normalised_tile + kOperandElements<Mma>);

  const int across = (p.width + kGradientColumns - 1) / kGradientColumns;
  const int down = (p.height + kGradientRows - 1) / kGradientRows;
  const int tile_x = blockIdx.x % across, tile_y = blockIdx.x / across % down;
  const int64_t b = blockIdx.x / (int64_t(across) * down);
  const int x0 = tile_x * (kGradientColumns / 2) - 2, y0 = tile_y * (kGradientRows / 2) - 2;
  constexpr int kPixels = kGradientRows * kGradientColumns,
                kTurns = (kPixels + kBackwardThreads<Mma> - 1) / kBackwardThreads<Mma>,
                kAtOnce = kBackwardThreads<Mma> / kBackwardChannels<Mma>;

  if constexpr (kDense)
    load_image<kTileImageRows, kTileImageColumns, 0>(image_tile, image, p, b, 2 * y0 - 3, 2 * x0 - 4);
  Acc sum[kTurns][kChannels] = {};
  for (int channel0 = 0; channel0 < p.out_channels; channel0 += kBackwardChannels<Mma>) {
    Acc unused[kOwnGradient] = {};
    if constexpr (kDense) load_norms<Mma>(norms, a.norm, channel0);
    barrier();
    PooledGradients<Mma> pooled;
    unsigned windows;
    const int64_t first = pooled.locate(p, b, y0, x0, channel0, windows);
    pooled.load(p, a, first, windows);
    pooled.scatter(gradient_tile, unused);
    if constexpr (kDense) normalised_convolution(normalised_tile, image_tile, p, a, norms, y0, x0, channel0);
    barrier();
    const int own = threadIdx.x % kBackwardChannels<Mma>, channel = channel0 + own;
    const Acc scale = a.norm.scale(channel) * a.norm.inverse_deviation(channel);
    const Acc constant = kDense ? g.sums.beta[channel] / g.count : Acc(0);
    const Acc slope = kDense ? g.sums.gamma[channel] / g.count : Acc(0);
    for (int place = threadIdx.x / kBackwardChannels<Mma>; place < kTileRows * kTilePixels; place += kAtOnce) {
      const int y = y0 + place / kTilePixels, x = x0 + place % kTilePixels;
      const bool inside = y >= 0 && y < p.conv_height && x >= 0 && x < p.conv_width;
      Element& value = gradient_tile[place * kOperandStride<Mma> + own];
      Acc centred = to_float(value);
      if constexpr (kDense) centred -= constant + slope * to_float(normalised_tile[place * kOperandStride<Mma> + own]);
      value = convert<Element>(inside ? scale * centred : Acc(0));
    }
    barrier();
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int pixel = threadIdx.x + turn * kBackwardThreads<Mma>;
      if (pixel >= kPixels) continue;
      const int row = pixel / kGradientColumns, column = pixel % kGradientColumns;
      // Output y0 + i of the convolution reads image row 2 (y0 + i) + ky - 3 with row ky of the kernel.
      for (int ky = (row + 1) % 2; ky < kSide; ky += 2)
        for (int kx = (column + 1) % 2; kx < kSide; kx += 2) {
          const int place = (row + 7 - ky) / 2 * kTilePixels + (column + 7 - kx) / 2;
          const Element* values = gradient_tile + place * kOperandStride<Mma>;
          const Acc* weight = g.weight + int64_t(channel0) * p.channels * kSide * kSide + ky * kSide + kx;
          // A sum of its own for each place: one for all of 16 times 32 terms would lose a bit and more of float32.
          Acc part[kChannels] = {};
          for (int o = 0; o < kBackwardChannels<Mma>; ++o)
#pragma unroll
            for (int c = 0; c < kChannels; ++c)
              if (c < p.channels)
                part[c] += to_float(values[o]) *
                           to_float(convert<Element>(weight[(int64_t(o) * p.channels + c) * kSide * kSide]));
#pragma unroll
          for (int c = 0; c < kChannels; ++c) sum[turn][c] += part[c];
        }
    }
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int pixel = threadIdx.x + turn * kBackwardThreads<Mma>;
    const int row = tile_y * kGradientRows + pixel / kGradientColumns;
    const int column = tile_x * kGradientColumns + pixel % kGradientColumns;
    if (pixel >= kPixels || row >= p.height || column >= p.width) continue;
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      if (c < p.channels)
        gradient[((b * p.channels + c) * p.height + row) * p.width + column] = convert<In>(sum[turn][c]);
  }
}

}  // namespace ceit::i2t
