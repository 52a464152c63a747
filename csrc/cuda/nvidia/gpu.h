// What kernels and their launchers use of a GPU: CUDA and PTX. A header of the same name that comes earlier on the
// include path takes its place (tests/simt).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define DEVICE __device__ __forceinline__
#define BOTH __host__ __device__ __forceinline__
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

#include "../words.h"

namespace ceit {

DEVICE void barrier() { __syncthreads(); }
template <class T>
DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Has the second level of cache load what is there.
DEVICE void prefetch(const void* pointer) { asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer)); }

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

inline void check(cudaError_t error, const char* name) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("ceit_kernels: launching ") + name + " failed: " + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes, void* stream,
            Arguments... arguments) {
  if (shared_bytes > (48 << 10))
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

}  // namespace ceit
