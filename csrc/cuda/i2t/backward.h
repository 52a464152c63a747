// Gradients of the weights and of BatchNorm, without the convolution's map in memory.
//
// With g the pooled gradient put back to the places of the maxima, x' the normalised convolution and n its count,
//   dz = gamma / deviation * (g - sum(g) / n - x' * sum(g x') / n)
// is linear in sums that one pass can take before it knows them: g (x) patch, x' (x) patch, patch and g. The
// convolution is computed again for x', tile by tile; sum(g x') follows from g (x) patch and the weights.
#pragma once

#include "mma.h"

namespace ceit::i2t {

constexpr int kTileRows = 14;  // of the convolution
constexpr int kTileImageRows = 2 * kTileRows + 5;
constexpr int kTileImageColumns = 2 * (kTilePixels - 1) + 10;
constexpr int kTileImageElements = kTileImageRows * kTileImageColumns * kChannels;
constexpr int kOwnGradient = 4;  // channels of a thread that scatters

// A warp has a group of output channels, and a row of the kernel.
template <class Mma>
constexpr int kBackwardThreads = 32 * kSide * Mma::kBackwardGroups;
template <class Mma>
constexpr int kBackwardChannels = kGroup * Mma::kBackwardGroups;  // of a block
template <class Mma>
constexpr int kOperandStride = kBackwardChannels<Mma> + 8;  // rows of operands begin in different banks
template <class Mma>
constexpr int kOperandElements = kTileRows * kTilePixels * kOperandStride<Mma>;
template <class Mma>
constexpr int kNormElements = 2 * kBackwardChannels<Mma>;

template <class Mma>
struct BackwardArguments {
  using Acc = typename Mma::Acc;
  const typename Mma::Element* weights;  // packed
  const typename Mma::Output* gradient;  // (B, H', W', O) of the result
  const uint8_t* indices;                // (B, H', W', O)
  Norm<Acc> norm;
};

// The pooled gradients that a thread scatters: those of the four windows that reach the four outputs under one pooled
// place of a tile (14 rows, 16 columns, a block's channels) from row y0 and column x0 (both even) of the convolution.
template <class Mma>
struct PooledGradients {
  static constexpr int kParts = kBackwardChannels<Mma> / kOwnGradient, kAcross = kTilePixels / 2;
  static_assert(kTileRows / 2 * kAcross * kParts == kBackwardThreads<Mma>);
  Pack<typename Mma::Output, kOwnGradient> values[4];
  Pack<uint8_t, kOwnGradient> places[4];

  DEVICE static int part() { return threadIdx.x % kParts; }
  DEVICE static int x() { return threadIdx.x / kParts % kAcross; }
  DEVICE static int y() { return threadIdx.x / (kParts * kAcross); }

  // Where those of the first window are, and which windows there are, as bits.
  DEVICE static int64_t locate(const Problem& p, int64_t b, int y0, int x0, int channel0, unsigned& windows) {
    const int py = y0 / 2 + y(), px = x0 / 2 + x();
    const unsigned columns =
        (px >= 0 && px < p.pooled_width ? 1 : 0) | (px + 1 >= 0 && px + 1 < p.pooled_width ? 2 : 0);
    windows =
        (py >= 0 && py < p.pooled_height ? columns : 0) | (py + 1 >= 0 && py + 1 < p.pooled_height ? columns * 4 : 0);
    return ((b * p.pooled_height + py) * p.pooled_width + px) * p.out_channels + channel0 + part() * kOwnGradient;
  }

  DEVICE void load(const Problem& p, const BackwardArguments<Mma>& a, int64_t first, unsigned windows) {
#pragma unroll
    for (int window = 0; window < 4; ++window) {
      values[window] = {};
      places[window] = {255, 255, 255, 255};
      if (!(windows >> window & 1)) continue;
      const int64_t at = first + (window / 2 * p.pooled_width + window % 2) * p.out_channels;
      values[window] = *reinterpret_cast<const Pack<typename Mma::Output, kOwnGradient>*>(a.gradient + at);
      places[window] = *reinterpret_cast<const Pack<uint8_t, kOwnGradient>*>(a.indices + at);
    }
  }

  // To the places of the maxima in the tile.
  DEVICE void scatter(typename Mma::Element* tile, typename Mma::Acc (&sums)[kOwnGradient]) const {
    typename Mma::Acc at[2][2][kOwnGradient] = {};
#pragma unroll
    for (int window = 0; window < 4; ++window) {
      const int dy = window / 2, dx = window % 2;
#pragma unroll
      for (int c = 0; c < kOwnGradient; ++c) {
        const auto value = to_float(values[window].value[c]);
        if (window == 0) sums[c] += value;
        // Row 1 - 2 dy + y of the window is row y of the four outputs.
#pragma unroll
        for (int y = dy; y < 2; ++y)
#pragma unroll
          for (int x = dx; x < 2; ++x)
            if (places[window].value[c] == 3 * (1 - 2 * dy + y) + 1 - 2 * dx + x) at[y][x][c] += value;
      }
    }
#pragma unroll
    for (int dy = 0; dy < 2; ++dy)
#pragma unroll
      for (int dx = 0; dx < 2; ++dx) {
        Pack<typename Mma::Element, kOwnGradient> out;
#pragma unroll
        for (int c = 0; c < kOwnGradient; ++c) out.value[c] = convert<typename Mma::Element>(at[dy][dx][c]);
        const int place = (2 * y() + dy) * kTilePixels + 2 * x() + dx;
        *reinterpret_cast<Pack<typename Mma::Element, kOwnGradient>*>(tile + place * kOperandStride<Mma> +
                                                                      part() * kOwnGradient) = out;
      }
  }
};

// The tiles of a block: every `stride`-th, without a division for each.
struct Tiles {
  int across, down, step_b, step_y, step_x;
  int b, y, x;

  DEVICE Tiles(const Problem& p, int first, int stride)
      : across((p.conv_width + kTilePixels - 1) / kTilePixels),
        down((p.conv_height + kTileRows - 1) / kTileRows),
        step_b(stride / across / down),
        step_y(stride / across % down),
        step_x(stride % across),
        b(first / across / down),
        y(first / across % down),
        x(first % across) {}

  DEVICE int y0() const { return y * kTileRows; }
  DEVICE int x0() const { return x * kTilePixels; }
  DEVICE void advance() {
    x += step_x, y += step_y, b += step_b;
    if (x >= across) x -= across, ++y;
    if (y >= down) y -= down, ++b;
  }
};

// What normalises raw values of a block's channels, once for all its tiles: (2, channels) means and factors.
template <class Mma, class Acc>
DEVICE void load_norms(Acc* norms, const Norm<Acc>& norm, int channel0) {
  if (threadIdx.x >= kBackwardChannels<Mma>) return;
  const int channel = channel0 + threadIdx.x;
  norms[threadIdx.x] = norm.sign(channel) * norm.mean[channel];
  norms[kBackwardChannels<Mma> + threadIdx.x] = norm.sign(channel) * norm.inverse_deviation(channel);
}

// The normalised convolution of the same tile, zero outside of the map. Each warp takes two rows of its group.
template <class Mma>
DEVICE void normalised_convolution(typename Mma::Element* tile, const typename Mma::Element* image, const Problem& p,
                                   const BackwardArguments<Mma>& a, const typename Mma::Acc* norms, int y0, int x0,
                                   int channel0) {
  using Acc = typename Mma::Acc;
  const int lane = lane_index(), warp = threadIdx.x / 32, row0 = warp % kSide * 2, group = warp / kSide * kGroup;
  constexpr int kTileRow = kTileImageColumns * kChannels;
  // A row of weights at a time: all of them take too many registers beside the sums.
  Acc acc[2][kFragments][4] = {};
#pragma unroll 3  // whole it spills
  for (int ky = 0; ky < kSide; ++ky) {
    typename Mma::Weights weights;
    weights.load(a.weights + int64_t(channel0 + group) * kDepth, ky);
#pragma unroll
    for (int y = 0; y < 2; ++y)
      Mma::accumulate(acc[y], Mma::load_pixels(image + (2 * (row0 + y) + ky) * kTileRow), weights);
  }
  const int own = group + lane % 4 * kOwn;
  const auto mean = *reinterpret_cast<const Pack<Acc, kOwn>*>(norms + own);
  const auto factor = *reinterpret_cast<const Pack<Acc, kOwn>*>(norms + kBackwardChannels<Mma> + own);
#pragma unroll
  for (int y = 0; y < 2; ++y)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + y, column = lane / 4 + 8 * h;
      const bool inside = y0 + row >= 0 && y0 + row < p.conv_height && x0 + column >= 0 && x0 + column < p.conv_width;
      Pack<typename Mma::Element, kOwn> values;
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        const Acc normalised = (acc[y][c / 2][c % 2 + 2 * h] - mean.value[c]) * factor.value[c];
        values.value[c] = convert<typename Mma::Element>(inside ? normalised : Acc(0));
      }
      *reinterpret_cast<Pack<typename Mma::Element, kOwn>*>(tile + (row * kTilePixels + column) * kOperandStride<Mma> +
                                                            own) = values;
    }
}

// What the blocks leave to be added up: a row for each block along x.
template <class Acc>
struct GradientSums {
  Acc* gradient_patches;    // (rows, O, C, 7, 7)
  Acc* normalised_patches;  // (rows, O, C, 7, 7)
  Acc* patches;             // (rows * blocks side by side, C, 7, 7)
  Acc* gradient;            // (rows, O)
};

// Column `column` of fragment f of a warp's 32 is element `f * 8 + column` of row ky of the kernel; -1 for padding.
DEVICE int weight_offset(int element, int ky, int channels) {
  const int kx = element / kChannels - 1, c = element % kChannels;
  return kx < 0 || c >= channels ? -1 : (c * kSide + ky) * kSide + kx;
}

// kDense: BatchNorm took its statistics from this call, so every output has a gradient.
template <class Mma, class In, bool kDense>
KERNEL(kBackwardThreads<Mma>, 1)
weight_gradient_kernel(Problem p, const In* image, BackwardArguments<Mma> a, GradientSums<typename Mma::Acc> sums) {
  using Acc = typename Mma::Acc;
  using Element = typename Mma::Element;
  SHARED_MEMORY(memory);
  Element* image_tile = reinterpret_cast<Element*>(memory);
  Element* gradient_tile = image_tile + kTileImageElements;
  Element* normalised_tile = gradient_tile + kOperandElements<Mma>;
  Acc* norms = reinterpret_cast<Acc*>(normalised_tile + kOperandElements<Mma>);

  const int channel0 = blockIdx.y * kBackwardChannels<Mma>, lane = lane_index();
  const int ky = threadIdx.x / 32 % kSide, group = threadIdx.x / (32 * kSide);
  constexpr int kTileRow = kTileImageColumns * kChannels;
  using ImageRun = Run<kTileImageRows, kTileImageColumns, 4, In>;
  static_assert(ImageRun::kCount <= kBackwardThreads<Mma>);
  const bool aligned = has_aligned_runs(image, p);

  // Where what this thread loads of the next tile is.
  Tiles next(p, blockIdx.x, gridDim.x);
  const In* pixels = nullptr;
  int64_t pooled_at = 0;
  unsigned windows = 0;
  const auto locate = [&] {
    pooled_at = PooledGradients<Mma>::locate(p, next.b, next.y0(), next.x0(), channel0, windows);
    if (aligned) pixels = ImageRun::begin(image, p, next.b, 2 * next.y0() - 3, 2 * next.x0() - 4, threadIdx.x);
  };
  locate();

  Acc of_gradient[4][4] = {}, of_normalised[4][4] = {}, of_patches[4] = {}, own_sums[kOwnGradient] = {};
  if constexpr (kDense) load_norms<Mma>(norms, a.norm, channel0);
  for (unsigned turn = 0; next.b < p.batch; ++turn) {
    const int b = next.b, y0 = next.y0(), x0 = next.x0();
    PooledGradients<Mma> pooled;
    pooled.load(p, a, pooled_at, windows);
    if (aligned) {
      ImageRun run;
      run.load(pixels, p);
      barrier();
      run.store(image_tile, threadIdx.x);
    } else {
      barrier();
      load_image<kTileImageRows, kTileImageColumns, 4>(image_tile, image, p, b, 2 * y0 - 3, 2 * x0 - 4);
    }
    pooled.scatter(gradient_tile, own_sums);
    barrier();
    if constexpr (kDense) {
      normalised_convolution(normalised_tile, image_tile, p, a, norms, y0, x0, channel0);
      barrier();
    }
    // The next tile comes from memory while this one is multiplied.
    next.advance();
    if (next.b < p.batch) {
      locate();
      if (windows & 1) prefetch(a.gradient + pooled_at), prefetch(a.indices + pooled_at);
      if (aligned) ImageRun::request(pixels, p);
    }
    // Patches are the same for all channels: blocks side by side sum those of some tiles, groups those of some rows.
    const bool mine = turn % gridDim.y == blockIdx.y;
    const int rows = min(kTileRows, p.conv_height - y0), columns = min(kTilePixels, p.conv_width - x0);
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      const typename Mma::Patches patches = Mma::load_patches(image_tile + (2 * row + ky) * kTileRow);
      const int operand = row * kTilePixels * kOperandStride<Mma> + group * kGroup;
      Mma::outer(of_gradient, gradient_tile + operand, kOperandStride<Mma>, patches);
      if constexpr (kDense) Mma::outer(of_normalised, normalised_tile + operand, kOperandStride<Mma>, patches);
      if (kDense && mine && row % Mma::kBackwardGroups == group) Mma::sum(of_patches, columns, patches);
    }
  }

  const int weights = p.channels * kSide * kSide;
#pragma unroll
  for (int f = 0; f < 4; ++f)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = weight_offset(f * 8 + lane % 4 * 2 + i % 2, ky, p.channels);
      if (k < 0) continue;
      const int channel = channel0 + group * kGroup + lane / 4 + i / 2 * 8;
      const int64_t at = (int64_t(blockIdx.x) * p.out_channels + channel) * weights + k;
      sums.gradient_patches[at] = of_gradient[f][i];
      if constexpr (kDense) sums.normalised_patches[at] = of_normalised[f][i];
    }

  barrier();
  Acc* shared = reinterpret_cast<Acc*>(memory);                                             // (threads, 4)
  Acc* shared_patches = shared + kBackwardThreads<Mma> * kOwnGradient + ky * kRowElements;  // (7, 32)
#pragma unroll
  for (int c = 0; c < kOwnGradient; ++c) shared[threadIdx.x * kOwnGradient + c] = own_sums[c];
#pragma unroll
  for (int f = 0; f < 4; ++f) {
    of_patches[f] += shuffle_xor(of_patches[f], 1);
    of_patches[f] += shuffle_xor(of_patches[f], 2);
    if (kDense && group > 0 && lane % 4 == 0) shared_patches[f * 8 + lane / 4] = of_patches[f];
  }
  barrier();
  if (threadIdx.x < kBackwardChannels<Mma>) {
    Acc sum = 0;  // the values of neighbouring threads are all channels
    for (int i = threadIdx.x; i < kBackwardThreads<Mma> * kOwnGradient; i += kBackwardChannels<Mma>) sum += shared[i];
    sums.gradient[int64_t(blockIdx.x) * p.out_channels + channel0 + threadIdx.x] = sum;
  }
#pragma unroll
  for (int f = 0; f < 4; ++f) {
    const int k = weight_offset(f * 8 + lane / 4, ky, p.channels);
    if (kDense && group == 0 && lane % 4 == 0 && k >= 0)
      sums.patches[(int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * weights + k] =
          of_patches[f] + (Mma::kBackwardGroups > 1 ? shared_patches[f * 8 + lane / 4] : Acc(0));
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
      const int parts = out_channels / kBackwardChannels<Mma>;
      for (int part = 0; part < parts; ++part) of_patches += sums.patches[(int64_t(row) * parts + part) * weights + k];
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
