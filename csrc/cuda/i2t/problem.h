// What all kernels of the stem agree on.
//
// The convolution is 7x7 with stride 2 and padding 3, the pool 3x3 with stride 2 and padding 1. In shared memory a
// pixel of the image has 4 channels (absent ones are zero), and a row of the kernel 8 columns, of which the first is
// zero: then the 8 elements that belong to two neighbouring columns always start at a multiple of 8.
#pragma once

#include "../device.h"
#include "calls.h"

namespace ceit::i2t {

constexpr int kChannels = 4;                  // of a pixel in shared memory
constexpr int kSide = 7;                      // of the convolution's kernel
constexpr int kRowElements = 8 * kChannels;   // of a kernel's row in shared memory's terms
constexpr int kDepth = kSide * kRowElements;  // of a matmul: 224, of which 147 are not zero for 3 channels
constexpr int kPixelStride = 2 * kChannels;   // elements between the windows of two neighbouring outputs
constexpr int kGroup = 16;                    // output channels of a warp: two 8-column fragments
constexpr int kOwn = 4;                       // of these, neighbours that one thread holds: 4 * (lane % 4) onwards
constexpr int kTilePixels = 16;               // neighbouring outputs of the convolution in a fragment

// What BatchNorm does to a raw value of one channel.
template <class Acc>
struct Affine {
  Acc mean, factor, shift;
  DEVICE Acc apply(Acc value) const { return (value - mean) * factor + shift; }
};

// BatchNorm as the kernels apply it. Raw values carry the sign of gamma, so that the pool always takes the maximum.
template <class Acc>
struct Norm {
  const Acc* gamma;     // (O,) or null
  const Acc* beta;      // (O,) or null
  const Acc* mean;      // (O,)
  const Acc* variance;  // (O,), biased
  Acc eps;

  DEVICE Acc scale(int channel) const { return gamma ? gamma[channel] : Acc(1); }
  DEVICE Acc sign(int channel) const { return scale(channel) < Acc(0) ? Acc(-1) : Acc(1); }
  DEVICE Acc inverse_deviation(int channel) const { return Acc(1) / sqrt(variance[channel] + eps); }
  // Of values that carry the sign. To be taken ahead of loops: stores keep the compiler from doing so.
  DEVICE Affine<Acc> affine(int channel) const {
    const Acc turned = sign(channel);
    return {turned * mean[channel], turned * (inverse_deviation(channel) * scale(channel)),
            beta ? beta[channel] : Acc(0)};
  }
};

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T value[N];
};

constexpr int kRun = 8;          // neighbouring pixels of a channel that a thread loads at once
constexpr int kRunChannels = 3;  // more would take too many registers

// Whether runs are loaded: every one that starts at a column divisible by kRun lies aligned in memory, inside of the
// image or outside.
template <class In>
DEVICE bool has_aligned_runs(const In* image, const Problem& p) {
  const int64_t strides = p.stride_batch | p.stride_channel | p.stride_row;
  return p.channels <= kRunChannels && p.stride_column == 1 && p.width % kRun == 0 &&
         strides % (16 / int(sizeof(In))) == 0 && reinterpret_cast<uintptr_t>(image) % 16 == 0;
}

// A run of pixels in registers, on its way from memory to a tile of (kRows, kColumns, 4) elements, which begins kBefore
// columns behind a run.
template <int kRows, int kColumns, int kBefore, class In>
struct Run {
  static constexpr int kAcross = (kBefore + kColumns + kRun - 1) / kRun, kCount = kRows * kAcross;  // in a tile
  Pack<In, kRun> channels[kRunChannels];

  // Where it begins in memory; null outside of the image.
  DEVICE static const In* begin(const In* image, const Problem& p, int64_t index, int row0, int column0, int item) {
    const int row = row0 + item / kAcross, column = column0 - kBefore + item % kAcross * kRun;
    const bool inside = item < kCount && row >= 0 && row < p.height && column >= 0 && column < p.width;
    return inside ? image + index * p.stride_batch + row * p.stride_row + column : nullptr;
  }

  DEVICE void load(const In* pixels, const Problem& p) {
#pragma unroll
    for (int c = 0; c < kRunChannels; ++c) {
      channels[c] = {};
      if (pixels && c < p.channels)
        channels[c] = *reinterpret_cast<const Pack<In, kRun>*>(pixels + c * p.stride_channel);
    }
  }

  // Has it come closer.
  DEVICE static void request(const In* pixels, const Problem& p) {
#pragma unroll
    for (int c = 0; c < kRunChannels; ++c)
      if (pixels && c < p.channels) prefetch(pixels + c * p.stride_channel);
  }

  template <class Element>
  DEVICE void store(Element* tile, int item) const {
    if (item >= kCount) return;
    auto* row = reinterpret_cast<Pack<Element, 2 * kChannels>*>(tile) + item / kAcross * (kColumns / 2);
    const int first = (item % kAcross * kRun - kBefore) / 2;
#pragma unroll
    for (int i = 0; i < kRun / 2; ++i) {
      Pack<Element, 2 * kChannels> pair;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < kRunChannels; ++c)
          pair.value[n * kChannels + c] = convert<Element>(channels[c].value[2 * i + n]);
        pair.value[n * kChannels + kRunChannels] = Element{};
      }
      if (first + i >= 0 && first + i < kColumns / 2) row[first + i] = pair;
    }
  }
};

// Rows `row0` onwards and columns `column0` onwards of one image, zero outside of it, as (kRows, kColumns, 4); kBefore
// is what is left of column0 divided by kRun.
template <int kRows, int kColumns, int kBefore, class Element, class In>
DEVICE void load_image(Element* tile, const In* __restrict__ image, const Problem& p, int64_t index, int row0,
                       int column0) {
  static_assert(kColumns % 2 == 0 && kBefore % 2 == 0);
  const In* base = image + index * p.stride_batch;
  if (has_aligned_runs(image, p)) {
    for (int item = threadIdx.x; item < Run<kRows, kColumns, kBefore, In>::kCount; item += blockDim.x) {
      Run<kRows, kColumns, kBefore, In> run;
      run.load(run.begin(image, p, index, row0, column0, item), p);
      run.store(tile, item);
    }
    return;
  }
  for (int item = threadIdx.x; item < kRows * kColumns; item += blockDim.x) {
    const int row = row0 + item / kColumns, column = column0 + item % kColumns;
    const bool pixel_inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
    const In* values = base + row * p.stride_row + column * p.stride_column;
    Pack<Element, kChannels> pixel;
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      pixel.value[c] = pixel_inside && c < p.channels ? convert<Element>(values[c * p.stride_channel]) : Element{};
    reinterpret_cast<Pack<Element, kChannels>*>(tile)[item] = pixel;
  }
}

}  // namespace ceit::i2t
