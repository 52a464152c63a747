// Matmuls of a warp, one struct for each way to multiply, with the same fragments of the result everywhere:
// a lane holds rows lane / 4 and lane / 4 + 8, columns 2 * (lane % 4) and the next.
//
// Column n of fragment f of a group of 16 output channels is channel 4 * (n / 2) + 2 * f + n % 2: so a thread's values
// of both fragments are 4 neighbouring channels, which it reads and writes at once.
#pragma once

#include "problem.h"

namespace ceit::i2t {

constexpr int kFragments = kGroup / 8;

DEVICE int lane_index() { return threadIdx.x % 32; }

// Tensor cores on 16-bit operands, m16n8k16.
template <class T>
struct HalfMma {
  using Element = T;  // of operands in shared memory
  using Output = T;
  using Acc = float;
  static constexpr int kSteps = kRowElements / 16;
  static constexpr int kForwardBlocks = 2;   // that a multiprocessor holds
  static constexpr int kBackwardGroups = 2;  // of output channels, in a block

  struct Pixels {
    Words<4> step[kSteps];
  };
  struct Patches {
    Words<2> fragment[4];
  };
  // The weights of a group for row ky of the kernel.
  struct Weights {
    Words<2> step[kSteps][kFragments];
    DEVICE void load(const Element* packed, int ky) {
      const Words<2>* lane = reinterpret_cast<const Words<2>*>(packed) + lane_index();
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int f = 0; f < kFragments; ++f) step[s][f] = lane[((ky * kSteps + s) * kFragments + f) * 32];
    }
  };

  // Which weight an element of a packed group is.
  BOTH static void locate(int index, int& channel, int& k) {
    const int lane = index / 4 % 32, fragment = index / 128 % kFragments, step = index / (128 * kFragments);
    k = step * 16 + index / 2 % 2 * 8 + lane % 4 * 2 + index % 2;
    channel = 4 * (lane / 4 / 2) + 2 * fragment + lane / 4 % 2;
  }

  // One row of the windows of 16 outputs; `row` is the first window's.
  DEVICE static Pixels load_pixels(const Element* row) {
    const int lane = lane_index();
    Pixels pixels;
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
      pixels.step[s] = load_matrices<false>(row + lane % 16 * kPixelStride + s * 16 + lane / 16 * 8);
    // The column before the window: its weight is zero, but zero times infinity is not.
    if (lane % 4 < 2) pixels.step[0].word[0] = pixels.step[0].word[1] = 0;
    return pixels;
  }
  DEVICE static void accumulate(float (&acc)[kFragments][4], const Pixels& pixels, const Weights& weights) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int f = 0; f < kFragments; ++f) multiply(acc[f], pixels.step[s], weights.step[s][f], T());
  }

  // The same row as the other operand of a matmul over the 16 outputs: 32 columns.
  DEVICE static Patches load_patches(const Element* row) {
    const int lane = lane_index();
    Patches patches;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Words<4> m = load_matrices<true>(row + lane % 16 * kPixelStride + i * 16 + lane / 16 * 8);
      patches.fragment[2 * i] = {m.word[0], m.word[1]};
      patches.fragment[2 * i + 1] = {m.word[2], m.word[3]};
    }
    return patches;
  }
  // acc (16 channels x 32) += operand^T (16 channels x 16 outputs) * patches
  DEVICE static void outer(float (&acc)[4][4], const Element* operand, int stride, const Patches& patches) {
    const int lane = lane_index();
    const Words<4> a = load_matrices<true>(operand + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
#pragma unroll
    for (int f = 0; f < 4; ++f) multiply(acc[f], a, patches.fragment[f], T());
  }
  // acc += a part of the sum of the first `count` outputs' patches: column f * 8 + lane / 4 is that of four lanes.
  DEVICE static void sum(float (&acc)[4], int count, const Patches& patches) {
    const int k = lane_index() % 4 * 2;
    const uint32_t masks[2] = {(k < count ? 0xffffu : 0) | (k + 1 < count ? 0xffff0000u : 0),
                               (k + 8 < count ? 0xffffu : 0) | (k + 9 < count ? 0xffff0000u : 0)};
#pragma unroll
    for (int f = 0; f < 4; ++f)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t pair = patches.fragment[f].word[i] & masks[i];
        acc[f] += to_float(T{uint16_t(pair)}) + to_float(T{uint16_t(pair >> 16)});
      }
  }
};

// Tensor cores on float32 rounded to TF32, m16n8k8.
struct Tf32Mma {
  using Element = Tf32;
  using Output = float;
  using Acc = float;
  static constexpr int kSteps = kRowElements / 8;
  static constexpr int kForwardBlocks = 1, kBackwardGroups = 1;

  struct Pixels {
    const Element* row;
  };
  struct Patches {
    Words<2> fragment[2][4];
  };
  // Too many for registers: read through L1 as they are used.
  struct Weights {
    const Words<2>* lane;
    DEVICE void load(const Element* packed, int ky) {
      lane = reinterpret_cast<const Words<2>*>(packed) + ky * kSteps * kFragments * 32 + lane_index();
    }
  };

  BOTH static void locate(int index, int& channel, int& k) {
    const int lane = index / 2 % 32, fragment = index / 64 % kFragments, step = index / (64 * kFragments);
    k = step * 8 + index % 2 * 4 + lane % 4;
    channel = 4 * (lane / 4 / 2) + 2 * fragment + lane / 4 % 2;
  }

  DEVICE static Pixels load_pixels(const Element* row) { return {row}; }
  DEVICE static void accumulate(float (&acc)[kFragments][4], const Pixels& pixels, const Weights& weights) {
    const int lane = lane_index();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      Words<4> a = load_matrices<false>(pixels.row + lane % 16 * kPixelStride + s * 8 + lane / 16 * 4);
      if (s == 0) a.word[0] = a.word[1] = 0;  // the column before the window, which may be infinite
#pragma unroll
      for (int f = 0; f < kFragments; ++f) multiply(acc[f], a, weights.lane[(s * kFragments + f) * 32], Tf32());
    }
  }

  DEVICE static Patches load_patches(const Element* row) {
    const int quad = lane_index() % 4, column = lane_index() / 4;
    Patches patches;
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int f = 0; f < 4; ++f)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          patches.fragment[s][f].word[i] =
              bit_cast<uint32_t>(row[(s * 8 + i * 4 + quad) * kPixelStride + f * 8 + column]);
    return patches;
  }
  DEVICE static void outer(float (&acc)[4][4], const Element* operand, int stride, const Patches& patches) {
    const int quad = lane_index() % 4, row = lane_index() / 4;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      Words<4> a;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a.word[i] = bit_cast<uint32_t>(operand[(s * 8 + i / 2 * 4 + quad) * stride + i % 2 * 8 + row]);
#pragma unroll
      for (int f = 0; f < 4; ++f) multiply(acc[f], a, patches.fragment[s][f], Tf32());
    }
  }
  DEVICE static void sum(float (&acc)[4], int count, const Patches& patches) {
    const int quad = lane_index() % 4;
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int f = 0; f < 4; ++f)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          acc[f] += s * 8 + i * 4 + quad < count ? bit_cast<float>(patches.fragment[s][f].word[i]) : 0.0f;
  }
};

// Ordinary arithmetic in float32, and on the host in float64.
template <class T>
struct ScalarMma {
  using Element = T;
  using Output = T;
  using Acc = T;
  static constexpr int kForwardBlocks = 1, kBackwardGroups = 1;

  struct Pixels {
    const T* row;
  };
  using Patches = Pixels;
  struct Weights {
    const Pack<T, kOwn>* own;
    DEVICE void load(const Element* packed, int ky) {
      own = reinterpret_cast<const Pack<T, kOwn>*>(packed) + ky * kRowElements * (kGroup / kOwn) + lane_index() % 4;
    }
  };

  BOTH static void locate(int index, int& channel, int& k) {
    channel = index % kGroup;
    k = index / kGroup;
  }

  DEVICE static Pixels load_pixels(const Element* row) { return {row}; }
  DEVICE static void accumulate(T (&acc)[kFragments][4], const Pixels& pixels, const Weights& weights) {
    const T* low = pixels.row + lane_index() / 4 * kPixelStride;
    const T* high = low + 8 * kPixelStride;
    // Not unrolled whole: 7 rows would not fit the instruction cache.
#pragma unroll 4
    for (int k = kChannels; k < kRowElements; ++k) {  // without the column before the window, which may be infinite
      const Pack<T, kOwn> w = weights.own[k * (kGroup / kOwn)];
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        acc[c / 2][c % 2] += low[k] * w.value[c];
        acc[c / 2][c % 2 + 2] += high[k] * w.value[c];
      }
    }
  }

  DEVICE static Patches load_patches(const Element* row) { return {row}; }
  DEVICE static void outer(T (&acc)[4][4], const Element* operand, int stride, const Patches& patches) {
    const int row = lane_index() / 4, column = lane_index() % 4 * 2;
#pragma unroll 2
    for (int k = 0; k < kTilePixels; ++k) {
      const T low = operand[k * stride + row], high = operand[k * stride + row + 8];
#pragma unroll
      for (int f = 0; f < 4; ++f)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          acc[f][i] += (i < 2 ? low : high) * patches.row[k * kPixelStride + f * 8 + column + i % 2];
    }
  }
  DEVICE static void sum(T (&acc)[4], int count, const Patches& patches) {
    const int column = lane_index() / 4;
    for (int k = lane_index() % 4; k < count; k += 4)
#pragma unroll
      for (int f = 0; f < 4; ++f) acc[f] += patches.row[k * kPixelStride + f * 8 + column];
  }
};

// Weights (O, C, 7, 7) into the order in which the warps read them, groups of 16 channels one after another. The sign
// of gamma is multiplied in: the raw values of a falling BatchNorm turn over, and the pool takes the maximum
// everywhere.
template <class Mma>
KERNEL(256, 1)
pack_weights(const typename Mma::Acc* weight, const typename Mma::Acc* gamma, typename Mma::Element* packed,
             int channels, int out_channels) {
  using Acc = typename Mma::Acc;
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= out_channels * kDepth) return;
  int channel, k;
  Mma::locate(index % (kGroup * kDepth), channel, k);
  channel += index / (kGroup * kDepth) * kGroup;
  const int ky = k / kRowElements, kx = k % kRowElements / kChannels - 1, c = k % kChannels;
  Acc value = 0;
  if (kx >= 0 && c < channels) value = weight[((int64_t(channel) * channels + c) * kSide + ky) * kSide + kx];
  if (gamma && gamma[channel] < Acc(0)) value = -value;
  packed[index] = convert<typename Mma::Element>(value);
}

}  // namespace ceit::i2t
