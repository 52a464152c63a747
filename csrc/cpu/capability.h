// Which of the compiled kernels this processor runs. csrc/native_build.py compiles every *_simd.cpp once for each
// capability that the target has, in a namespace of its name, and defines CEIT_HAS_<NAME> where they are chosen.
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace ceit {

enum class Capability { baseline, avx2, avx512, avx512bf16 };

static inline const char* name_of(Capability capability) {
  switch (capability) {
    case Capability::avx512bf16: return "avx512bf16";
    case Capability::avx512: return "avx512";
    case Capability::avx2: return "avx2";
    default: return "baseline";
  }
}

// The best that the processor has, or what CEIT_KERNELS_CPU names if it has that.
inline Capability capability() {
  static const Capability chosen = [] {
    Capability best = Capability::baseline;
#if defined(CEIT_HAS_AVX2)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Capability::avx2;
#endif
#if defined(CEIT_HAS_AVX512)
    if (best == Capability::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      best = Capability::avx512;
#endif
#if defined(CEIT_HAS_AVX512BF16)
    if (best == Capability::avx512 && __builtin_cpu_supports("avx512bf16")) best = Capability::avx512bf16;
#endif
    const char* wanted = std::getenv("CEIT_KERNELS_CPU");
    for (const auto lesser : {Capability::baseline, Capability::avx2, Capability::avx512})
      if (wanted && std::strcmp(wanted, name_of(lesser)) == 0 && lesser < best) best = lesser;
    return best;
  }();
  return chosen;
}

}  // namespace ceit

// Declares `type name` in every compiled capability's namespace, and `chosen()`, the one of this processor.
#if defined(CEIT_HAS_AVX512BF16)
#define CEIT_IF_AVX512BF16(...) __VA_ARGS__
#else
#define CEIT_IF_AVX512BF16(...)
#endif
#if defined(CEIT_HAS_AVX512)
#define CEIT_IF_AVX512(...) __VA_ARGS__
#else
#define CEIT_IF_AVX512(...)
#endif
#if defined(CEIT_HAS_AVX2)
#define CEIT_IF_AVX2(...) __VA_ARGS__
#else
#define CEIT_IF_AVX2(...)
#endif

#define CEIT_DECLARE_TABLE(Table, name, count)                                                      \
  namespace baseline {                                                                              \
  extern const Table name[count];                                                                   \
  }                                                                                                 \
  CEIT_IF_AVX2(namespace avx2 { extern const Table name[count]; })                                  \
  CEIT_IF_AVX512(namespace avx512 { extern const Table name[count]; })                              \
  CEIT_IF_AVX512BF16(namespace avx512bf16 { extern const Table name[count]; })                      \
  inline const Table& chosen(int index) {                                                           \
    CEIT_IF_AVX512BF16(if (capability() == Capability::avx512bf16) return avx512bf16::name[index];) \
    CEIT_IF_AVX512(if (capability() == Capability::avx512) return avx512::name[index];)             \
    CEIT_IF_AVX2(if (capability() == Capability::avx2) return avx2::name[index];)                   \
    return baseline::name[index];                                                                   \
  }
