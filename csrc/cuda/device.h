// What kernels use of a GPU: types, barriers, warp collectives, matrix instructions. Compiled by nvcc these are CUDA
// and PTX; by a host compiler they run over csrc/simt, with PTX's fragment layouts, so that tests execute the same
// kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DEVICE __device__ __forceinline__
#define BOTH __host__ __device__ __forceinline__
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "../simt/simt.h"
#define __restrict__ __restrict
#define DEVICE inline
#define BOTH inline
#define KERNEL(threads, blocks) inline void
#define SHARED_MEMORY(name) unsigned char* const name = simt::block->shared.get()
#define threadIdx (simt::fiber->thread)
#define blockIdx (simt::block->index)
#define blockDim (simt::block->size)
#define gridDim (simt::block->grid)
#endif

namespace ceit {

// 16-bit floating-point numbers as bits, the same on both compilers.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
// A float that tensor cores read as TF32.
struct Tf32 {
  float value;
};

template <int N>
struct alignas(N < 4 ? N * 4 : 16) Words {
  uint32_t word[N];
};

template <class To, class From>
BOTH To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

#ifdef __CUDACC__

DEVICE void barrier() { __syncthreads(); }
template <class T>
DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

DEVICE float to_float(Bf16 x) { return __bfloat162float(bit_cast<__nv_bfloat16>(x)); }
DEVICE float to_float(Fp16 x) { return __half2float(bit_cast<__half>(x)); }
DEVICE void from_float(float x, Bf16& y) { y = bit_cast<Bf16>(__float2bfloat16_rn(x)); }
DEVICE void from_float(float x, Fp16& y) { y = bit_cast<Fp16>(__float2half_rn(x)); }
DEVICE void from_float(float x, Tf32& y) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  y = bit_cast<Tf32>(bits);
}

// Four 8x8 matrices of 16-bit elements from shared memory; lanes 8i to 8i+7 give the addresses of the rows of matrix i.
template <bool kTransposed>
DEVICE Words<4> load_matrices(const void* row) {
  Words<4> m;
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m.word[0]), "=r"(m.word[1]), "=r"(m.word[2]), "=r"(m.word[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m.word[0]), "=r"(m.word[1]), "=r"(m.word[2]), "=r"(m.word[3])
                 : "r"(address)
                 : "memory");
  return m;
}

#define CEIT_MMA(shape_and_types)                                                                                     \
  asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                       \
               : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), "r"(b.word[1]))

// c (16 x 8) += a (16 x 16, or 16 x 8 of TF32) * b
DEVICE void multiply(float (&c)[4], const Words<4>& a, const Words<2>& b, Bf16) {
  CEIT_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
DEVICE void multiply(float (&c)[4], const Words<4>& a, const Words<2>& b, Fp16) {
  CEIT_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
DEVICE void multiply(float (&c)[4], const Words<4>& a, const Words<2>& b, Tf32) {
  CEIT_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef CEIT_MMA

#else

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

#endif

BOTH float to_float(float x) { return x; }
BOTH double to_float(double x) { return x; }
BOTH void from_float(float x, float& y) { y = x; }
BOTH void from_float(double x, double& y) { y = x; }
BOTH float to_float(Tf32 x) { return x.value; }

template <class To, class From>
DEVICE To convert(From x) {
  To y;
  from_float(x, y);
  return y;
}

}  // namespace ceit
