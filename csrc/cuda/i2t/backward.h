// Gradients of the weights and of BatchNorm, without the convolution's map in memory.
//
// With g the pooled gradient put back to the places of the maxima, x' the normalised convolution and n its count,
//   dz = gamma / deviation * (g - sum(g) / n - x' * sum(g x') / n)
// is linear in sums that one pass can take before it knows them: g (x) patch, x' (x) patch, patch and g. The
// convolution is computed again for x', tile by tile; sum(g x') follows from g (x) patch and the weights.
#pragma once

#include "mma.h"

namespace ceit::i2t {

constexpr int kTileRows = 14;          // of the convolution, two for each warp
constexpr int kBackwardWarps = kSide;  // a warp takes one row of the kernel in the matmuls
constexpr int kBackwardThreads = 32 * kBackwardWarps;
constexpr int kBackwardChannels = 2 * kGroup;  // of a block
constexpr int kTileImageRows = 2 * kTileRows + 5;
constexpr int kTileImageColumns = 2 * (kTilePixels - 1) + 10;
constexpr int kOperandStride = kBackwardChannels + 8;  // rows of operands begin in different banks
constexpr int kOperandElements = kTileRows * kTilePixels * kOperandStride;
constexpr int kTileImageElements = kTileImageRows * kTileImageColumns * kChannels;
constexpr int kOwnGradient = 8;  // channels of a thread that scatters

template <class Mma>
struct BackwardArguments {
  using Acc = typename Mma::Acc;
  const typename Mma::Element* weights;  // packed
  const typename Mma::Output* gradient;  // (B, H', W', O) of the result
  const uint8_t* indices;                // (B, H', W', O)
  Norm<Acc> norm;
};

// The pooled gradient at the places of the maxima: a tile of (14 rows, 16 columns, 32 channels) from row y0 and column
// x0 (both even) of the convolution. A thread takes the four outputs under one pooled place, which four windows reach.
template <class Mma>
DEVICE void scatter_gradient(typename Mma::Element* tile, const Problem& p, const BackwardArguments<Mma>& a, int64_t b,
                             int y0, int x0, int channel0, typename Mma::Acc (&sums)[kOwnGradient]) {
  using Acc = typename Mma::Acc;
  using Gradients = Pack<typename Mma::Output, kOwnGradient>;
  constexpr int kParts = kBackwardChannels / kOwnGradient, kAcross = kTilePixels / 2;
  static_assert(kTileRows / 2 * kAcross * kParts == kBackwardThreads);
  const int part = threadIdx.x % kParts, quad_x = threadIdx.x / kParts % kAcross,
            quad_y = threadIdx.x / (kParts * kAcross);
  const int qy = y0 / 2 + quad_y, qx = x0 / 2 + quad_x;
  Acc at[2][2][kOwnGradient] = {};
#pragma unroll
  for (int window = 0; window < 4; ++window) {
    const int dy = window / 2, dx = window % 2, py = qy + dy, px = qx + dx;
    if (py < 0 || px < 0 || py >= p.pooled_height || px >= p.pooled_width) continue;
    const int64_t offset =
        ((b * p.pooled_height + py) * p.pooled_width + px) * p.out_channels + channel0 + part * kOwnGradient;
    const Gradients g = *reinterpret_cast<const Gradients*>(a.gradient + offset);
    const Pack<uint8_t, kOwnGradient> index = *reinterpret_cast<const Pack<uint8_t, kOwnGradient>*>(a.indices + offset);
#pragma unroll
    for (int c = 0; c < kOwnGradient; ++c) {
      const Acc value = to_float(g.value[c]);
      if (window == 0) sums[c] += value;
      // Row 1 - 2 dy + y of the window is row y of the four outputs.
#pragma unroll
      for (int y = dy; y < 2; ++y)
#pragma unroll
        for (int x = dx; x < 2; ++x)
          if (index.value[c] == 3 * (1 - 2 * dy + y) + 1 - 2 * dx + x) at[y][x][c] += value;
    }
  }
#pragma unroll
  for (int y = 0; y < 2; ++y)
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      Pack<typename Mma::Element, kOwnGradient> values;
#pragma unroll
      for (int c = 0; c < kOwnGradient; ++c) values.value[c] = convert<typename Mma::Element>(at[y][x][c]);
      const int place = (2 * quad_y + y) * kTilePixels + 2 * quad_x + x;
      *reinterpret_cast<Pack<typename Mma::Element, kOwnGradient>*>(tile + place * kOperandStride +
                                                                    part * kOwnGradient) = values;
    }
}

// The normalised convolution of the same tile, zero outside of the map. Each warp takes two rows.
template <class Mma>
DEVICE void normalised_convolution(typename Mma::Element* tile, const typename Mma::Element* image, const Problem& p,
                                   const BackwardArguments<Mma>& a, int y0, int x0, int channel0) {
  using Acc = typename Mma::Acc;
  const int lane = lane_index(), row0 = threadIdx.x / 32 * 2;
  constexpr int kTileRow = kTileImageColumns * kChannels;
#pragma unroll 1
  for (int group = 0; group < kBackwardChannels; group += kGroup) {
    typename Mma::Weights weights;
    weights.load(a.weights + int64_t(channel0 + group) * kDepth);
    const int own = group + lane % 4 * kOwn, channel = channel0 + own;
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      Acc acc[kFragments][4] = {};
#pragma unroll
      for (int ky = 0; ky < kSide; ++ky)
        Mma::accumulate(acc, Mma::load_pixels(image + (2 * (row0 + y) + ky) * kTileRow), weights, ky);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row0 + y, column = lane / 4 + 8 * h;
        const bool inside = y0 + row >= 0 && y0 + row < p.conv_height && x0 + column >= 0 && x0 + column < p.conv_width;
        Pack<typename Mma::Element, kOwn> values;
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
          const Acc raw = acc[c / 2][c % 2 + 2 * h] * a.norm.sign(channel + c);
          const Acc normalised = (raw - a.norm.mean[channel + c]) * a.norm.inverse_deviation(channel + c);
          values.value[c] = convert<typename Mma::Element>(inside ? normalised : Acc(0));
        }
        *reinterpret_cast<Pack<typename Mma::Element, kOwn>*>(tile + (row * kTilePixels + column) * kOperandStride +
                                                              own) = values;
      }
    }
  }
}

// What the blocks leave to be added up: a row for each block along x.
template <class Acc>
struct GradientSums {
  Acc* gradient_patches;    // (rows, O, C, 7, 7)
  Acc* normalised_patches;  // (rows, O, C, 7, 7)
  Acc* patches;             // (rows, C, 7, 7)
  Acc* gradient;            // (rows, O)
};

// Column `column` of fragment f of a warp's 32 is element `f * 8 + column` of row ky of the kernel; -1 for padding.
DEVICE int weight_offset(int element, int ky, int channels) {
  const int kx = element / kChannels - 1, c = element % kChannels;
  return kx < 0 || c >= channels ? -1 : (c * kSide + ky) * kSide + kx;
}

// kDense: BatchNorm took its statistics from this call, so every output has a gradient.
template <class Mma, class In, bool kDense>
KERNEL(kBackwardThreads, 1)
weight_gradient_kernel(Problem p, const In* image, BackwardArguments<Mma> a, GradientSums<typename Mma::Acc> sums) {
  using Acc = typename Mma::Acc;
  using Element = typename Mma::Element;
  SHARED_MEMORY(memory);
  Element* image_tile = reinterpret_cast<Element*>(memory);
  Element* gradient_tile = image_tile + kTileImageElements;
  Element* normalised_tile = gradient_tile + kOperandElements;

  const int channel0 = blockIdx.y * kBackwardChannels, ky = threadIdx.x / 32, lane = lane_index();
  const int across = (p.conv_width + kTilePixels - 1) / kTilePixels, down = (p.conv_height + kTileRows - 1) / kTileRows;
  const int64_t tiles = int64_t(p.batch) * down * across;
  constexpr int kTileRow = kTileImageColumns * kChannels;

  Acc of_gradient[2][4][4] = {}, of_normalised[2][4][4] = {}, of_patches[4][4] = {}, own_sums[kOwnGradient] = {};
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int x0 = int(tile % across) * kTilePixels, y0 = int(tile / across % down) * kTileRows;
    const int64_t b = tile / (int64_t(across) * down);
    barrier();
    load_image<kTileImageRows, kTileImageColumns>(image_tile, image, p, b, 2 * y0 - 3, 2 * x0 - 4);
    scatter_gradient(gradient_tile, p, a, b, y0, x0, channel0, own_sums);
    barrier();
    if constexpr (kDense) {
      normalised_convolution(normalised_tile, image_tile, p, a, y0, x0, channel0);
      barrier();
    }
    const int rows = min(kTileRows, p.conv_height - y0), columns = min(kTilePixels, p.conv_width - x0);
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      const typename Mma::Patches patches = Mma::load_patches(image_tile + (2 * row + ky) * kTileRow);
      const int operand = row * kTilePixels * kOperandStride;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        Mma::outer(of_gradient[m], gradient_tile + operand + m * 16, kOperandStride, patches);
        if constexpr (kDense) Mma::outer(of_normalised[m], normalised_tile + operand + m * 16, kOperandStride, patches);
      }
      if constexpr (kDense) Mma::sum(of_patches, columns, patches);
    }
  }

  const int weights = p.channels * kSide * kSide;
#pragma unroll
  for (int f = 0; f < 4; ++f)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = weight_offset(f * 8 + lane % 4 * 2 + i % 2, ky, p.channels);
      if (k < 0) continue;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int channel = channel0 + m * 16 + lane / 4 + i / 2 * 8;
        const int64_t at = (int64_t(blockIdx.x) * p.out_channels + channel) * weights + k;
        sums.gradient_patches[at] = of_gradient[m][f][i];
        if constexpr (kDense) sums.normalised_patches[at] = of_normalised[m][f][i];
      }
      if constexpr (kDense)
        if (blockIdx.y == 0 && lane < 4 && i < 2) sums.patches[int64_t(blockIdx.x) * weights + k] = of_patches[f][i];
    }

  barrier();
  Acc* shared = reinterpret_cast<Acc*>(memory);  // (threads, 8)
#pragma unroll
  for (int c = 0; c < kOwnGradient; ++c) shared[threadIdx.x * kOwnGradient + c] = own_sums[c];
  barrier();
  if (threadIdx.x < kBackwardChannels) {
    Acc sum = 0;  // the values of 4 neighbouring threads are the 32 channels
    for (int i = threadIdx.x; i < kBackwardThreads * kOwnGradient; i += kBackwardChannels) sum += shared[i];
    sums.gradient[int64_t(blockIdx.x) * p.out_channels + channel0 + threadIdx.x] = sum;
  }
}

constexpr int kFinishThreads = 256;

template <class Acc>
struct Gradients {
  Acc* weight;  // (O, C, 7, 7)
  Acc* gamma;   // (O,)
  Acc* beta;    // (O,)
};

// Adds up what the blocks left, in their order; one block for each output channel.
template <class Mma>
KERNEL(kFinishThreads, 1)
finish_gradients(GradientSums<typename Mma::Acc> sums, int rows, int channels, bool dense, typename Mma::Acc count,
                 const typename Mma::Acc* weight, Norm<typename Mma::Acc> norm, Gradients<typename Mma::Acc> out) {
  using Acc = typename Mma::Acc;
  SHARED_MEMORY(memory);
  Acc* shared = reinterpret_cast<Acc*>(memory);
  const int channel = blockIdx.x, out_channels = gridDim.x, k = threadIdx.x, weights = channels * kSide * kSide;
  Acc gradient = 0, of_gradient = 0, of_normalised = 0, of_patches = 0;
  for (int row = 0; row < rows; ++row) gradient += sums.gradient[int64_t(row) * out_channels + channel];
  if (k < weights)
    for (int row = 0; row < rows; ++row) {
      const int64_t at = (int64_t(row) * out_channels + channel) * weights + k;
      of_gradient += sums.gradient_patches[at];
      if (!dense) continue;
      of_normalised += sums.normalised_patches[at];
      of_patches += sums.patches[int64_t(row) * weights + k];
    }
  // By the rounded weights, as the convolution took them.
  shared[k] =
      k < weights ? to_float(convert<typename Mma::Element>(weight[int64_t(channel) * weights + k])) * of_gradient : 0;
  barrier();
  for (int half = kFinishThreads / 2; half > 0; half /= 2) {
    if (k < half) shared[k] += shared[k + half];
    barrier();
  }
  const Acc inverse = norm.inverse_deviation(channel);
  const Acc of_gamma = (shared[0] - norm.mean[channel] * gradient) * inverse;
  if (k < weights) {
    const Acc whole =
        dense ? of_gradient - gradient / count * of_patches - of_gamma / count * of_normalised : of_gradient;
    out.weight[int64_t(channel) * weights + k] = norm.scale(channel) * inverse * whole;
  }
  if (k == 0) {
    out.gamma[channel] = of_gamma;
    out.beta[channel] = gradient;
  }
}

}  // namespace ceit::i2t
