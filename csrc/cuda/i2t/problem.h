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
  // Of a value that carries the sign.
  DEVICE Acc apply(Acc value, int channel) const {
    const Acc centred = value * sign(channel) - mean[channel];
    return centred * (inverse_deviation(channel) * scale(channel)) + (beta ? beta[channel] : Acc(0));
  }
};

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T value[N];
};

// Rows `row0` onwards and columns `column0` (even) onwards of one image, zero outside of it, as (kRows, kColumns, 4).
template <int kRows, int kColumns, class Element, class In>
DEVICE void load_image(Element* tile, const In* __restrict__ image, const Problem& p, int64_t index, int row0,
                       int column0) {
  static_assert(kColumns % 2 == 0);
  constexpr int kPairs = kColumns / 2;
  const In* base = image + index * p.stride_batch;
  for (int item = threadIdx.x; item < kRows * kPairs; item += blockDim.x) {
    const int row = row0 + item / kPairs, column = column0 + item % kPairs * 2;
    const bool row_inside = row >= 0 && row < p.height;
    Pack<Element, 2 * kChannels> pixels;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const bool inside = row_inside && c < p.channels && column + i >= 0 && column + i < p.width;
        const int64_t offset = c * p.stride_channel + row * p.stride_row + (column + i) * p.stride_column;
        pixels.value[i * kChannels + c] = convert<Element>(inside ? to_float(base[offset]) : 0);
      }
    reinterpret_cast<Pack<Element, 2 * kChannels>*>(tile)[item] = pixels;
  }
}

}  // namespace ceit::i2t
