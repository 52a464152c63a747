// The GPU of csrc/cuda/nvidia/gpu.h on the host, over simt.h, with PTX's fragment layouts, so that tests execute the
// same kernels.
#pragma once

#include "simt.h"

#define __restrict__ __restrict
#define DEVICE inline
#define BOTH inline
#define KERNEL(threads, blocks) inline void
#define SHARED_MEMORY(name) unsigned char* const name = simt::block->shared.get()
#define threadIdx (simt::fiber->thread)
#define blockIdx (simt::block->index)
#define blockDim (simt::block->size)
#define gridDim (simt::block->grid)

#include <words.h>

namespace ceit {

using std::min;

inline void barrier() { simt::barrier(); }
template <class T>
T shuffle(T value, int lane) {
  struct In {
    T value;
    int lane;
  };
  return simt::collective<T>(In{value, lane}, [](const In* in, T* out) {
    for (int i = 0; i < simt::kWarp; ++i) out[i] = in[in[i].lane & 31].value;
  });
}
template <class T>
T shuffle_xor(T value, int mask) {
  return shuffle(value, int(simt::fiber->index % simt::kWarp) ^ mask);
}

inline void prefetch(const void* pointer) { static_cast<void>(*static_cast<const volatile char*>(pointer)); }

inline float to_float(Bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline void from_float(float x, Bf16& y) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  y.bits = x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float to_float(Fp16 x) { return float(bit_cast<_Float16>(x)); }
inline void from_float(float x, Fp16& y) { y = bit_cast<Fp16>(_Float16(x)); }
inline void from_float(float x, Tf32& y) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  y.value = x - x != 0 ? x : bit_cast<float>((bits + 0x1000) & ~0x1fffu);
}

template <bool kTransposed>
Words<4> load_matrices(const void* row) {
  return simt::collective<Words<4>>(row, [](const void* const* rows, Words<4>* out) {
    for (int lane = 0; lane < simt::kWarp; ++lane)
      for (int m = 0; m < 4; ++m)
        for (int i = 0; i < 2; ++i) {
          const int r = kTransposed ? lane % 4 * 2 + i : lane / 4, c = kTransposed ? lane / 4 : lane % 4 * 2 + i;
          if (reinterpret_cast<uintptr_t>(rows[m * 8 + r]) % 16) simt::fail("a matrix row is not aligned to 16 bytes");
          const uint16_t element = static_cast<const uint16_t*>(rows[m * 8 + r])[c];
          out[lane].word[m] = (i ? out[lane].word[m] : 0) | uint32_t(element) << (16 * i);
        }
  });
}

struct MmaIn {
  float c[4];
  Words<4> a;
  Words<2> b;
};
struct MmaOut {
  float c[4];
};

template <class T>
float fragment_element(const uint32_t* words, int index) {
  if constexpr (sizeof(T) == 4)
    return bit_cast<float>(words[index]);
  else
    return to_float(T{uint16_t(words[index / 2] >> (16 * (index % 2)))});
}

// c += a * b by the fragment layouts of the PTX manual: a lane holds 2 (or 1 of TF32) neighbours along k in a register.
template <class T>
void multiply(float (&c)[4], const Words<4>& a, const Words<2>& b, T) {
  constexpr int kPack = 4 / sizeof(T), kHalf = 4 * kPack;
  MmaIn mine{{c[0], c[1], c[2], c[3]}, a, b};
  const MmaOut result = simt::collective<MmaOut>(mine, [](const MmaIn* in, MmaOut* out) {
    for (int lane = 0; lane < simt::kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = in[lane].c[i];
        for (int k = 0; k < 2 * kHalf; ++k) {
          const int quad = k % kHalf / kPack, register_a = row / 8 + 2 * (k / kHalf);
          const float x = fragment_element<T>(in[row % 8 * 4 + quad].a.word, register_a * kPack + k % kPack);
          const float y = fragment_element<T>(in[column * 4 + quad].b.word, k / kHalf * kPack + k % kPack);
          sum += x * y;
        }
        out[lane].c[i] = sum;
      }
  });
  memcpy(c, result.c, sizeof(c));
}

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes, void*,
            Arguments... arguments) {
  simt::launch({unsigned(grid.x), unsigned(grid.y), 1}, {unsigned(threads), 1, 1}, shared_bytes,
               [=] { kernel(arguments...); });
}

}  // namespace ceit
