// Vectors of the widest kind that a translation unit is compiled for, in the compiler's own vector types.
//
// Kernels are compiled once for each capability (see capability.h), in a namespace of its name, so that nothing inline
// is shared between code for different processors. No standard containers or algorithms here for the same reason.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../types.h"

#ifndef CEIT_CAPABILITY
#error "compile with -DCEIT_CAPABILITY=<name>"
#endif

namespace ceit {
namespace CEIT_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

using ceit::Bf16;

#define CEIT_INLINE inline __attribute__((always_inline))

template <class Acc>
struct Lanes {
  static constexpr int count = kVectorBytes / int(sizeof(Acc));
  typedef Acc Vector __attribute__((vector_size(kVectorBytes)));
  // As many lanes of 32 or 16 bits, for conversions.
  typedef int32_t Ints __attribute__((vector_size(count * 4)));
  typedef uint32_t Words __attribute__((vector_size(count * 4)));
  typedef uint16_t Halves __attribute__((vector_size(count * 2)));
};
template <class Acc>
using Vec = typename Lanes<Acc>::Vector;

template <class Acc>
CEIT_INLINE Vec<Acc> splat(Acc value) {
  return value - Vec<Acc>{};
}

template <class V>
CEIT_INLINE V load_vector(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

CEIT_INLINE Vec<float> load(const float* from) { return load_vector<Vec<float>>(from); }
CEIT_INLINE Vec<double> load(const double* from) { return load_vector<Vec<double>>(from); }
CEIT_INLINE Vec<float> load(const Bf16* from) {
  using L = Lanes<float>;
  const auto words = __builtin_convertvector(load_vector<L::Halves>(from), L::Words) << 16;
  return reinterpret_cast<Vec<float>>(words);
}

CEIT_INLINE void store(float* to, Vec<float> v) { std::memcpy(to, &v, sizeof v); }
CEIT_INLINE void store(double* to, Vec<double> v) { std::memcpy(to, &v, sizeof v); }
CEIT_INLINE void store(Bf16* to, Vec<float> v) {
#if defined(__AVX512BF16__)
  const auto halves = _mm512_cvtneps_pbh(__m512(v));
#else
  using L = Lanes<float>;
  const auto words = reinterpret_cast<L::Words>(v);
  const auto rounded = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
  const auto is_nan = reinterpret_cast<L::Words>(v != v);
  const auto halves = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), L::Halves);
#endif
  std::memcpy(to, &halves, sizeof halves);
}

// The first `n` lanes; the others are zero, and are not touched in memory.
template <class T>
CEIT_INLINE Vec<acc_t<T>> load(const T* from, int n) {
  constexpr int lanes = Lanes<acc_t<T>>::count;
  if (n >= lanes) return load(from);
  T buffer[lanes] = {};
  std::memcpy(static_cast<void*>(buffer), from, sizeof(T) * size_t(n));
  return load(buffer);
}
template <class T>
CEIT_INLINE void store(T* to, Vec<acc_t<T>> v, int n) {
  constexpr int lanes = Lanes<acc_t<T>>::count;
  if (n >= lanes) return store(to, v);
  T buffer[lanes];
  store(buffer, v);
  std::memcpy(static_cast<void*>(to), buffer, sizeof(T) * size_t(n));
}
#if defined(__AVX512F__)
template <>
CEIT_INLINE Vec<float> load<float>(const float* from, int n) {
  if (n >= Lanes<float>::count) return load(from);
  return Vec<float>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), from));
}
template <>
CEIT_INLINE void store<float>(float* to, Vec<float> v, int n) {
  if (n >= Lanes<float>::count) return store(to, v);
  _mm512_mask_storeu_ps(to, __mmask16((1u << n) - 1), __m512(v));
}
#endif

// A number of lanes that is known when it is compiled.
template <int kCount>
struct Count {
  CEIT_INLINE constexpr operator int() const { return kCount; }
};

// Calls body(at, count) for every vector of a range; the count is a `Count` but for the last, which may be short.
template <class Acc, class Body>
CEIT_INLINE void for_vectors(int64_t first, int64_t last, Body body) {
  constexpr int lanes = Lanes<Acc>::count;
  int64_t at = first;
  for (; at + lanes <= last; at += lanes) body(at, Count<lanes>());
  if (at < last) body(at, int(last - at));
}
template <class Acc, class Body>
CEIT_INLINE void for_vectors(int64_t count, Body body) {
  for_vectors<Acc>(0, count, body);
}

// The lanes by twos, fours and so on.
template <class Acc, class Body>
CEIT_INLINE Acc reduce_lanes(Vec<Acc> v, Body body) {
  constexpr int lanes = Lanes<Acc>::count;
  Acc values[lanes];
  std::memcpy(values, &v, sizeof v);
  for (int width = lanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) values[i] = body(values[i], values[i + width]);
  return values[0];
}
template <class Acc>
CEIT_INLINE Acc sum_of_lanes(Vec<Acc> v) {
  return reduce_lanes<Acc>(v, [](Acc a, Acc b) { return a + b; });
}
template <class Acc>
CEIT_INLINE Acc largest_lane(Vec<Acc> v) {
  return reduce_lanes<Acc>(v, [](Acc a, Acc b) { return b > a ? b : a; });
}

// The second where one is not a number, as the instructions have it, which compilers do not find by themselves.
template <class Acc>
CEIT_INLINE Vec<Acc> smaller(Vec<Acc> a, Vec<Acc> b) {
  return a < b ? a : b;
}
template <class Acc>
CEIT_INLINE Vec<Acc> larger(Vec<Acc> a, Vec<Acc> b) {
  return a > b ? a : b;
}
// 1 / x for an x whose reciprocal is normal, within a unit in the last place.
template <class Acc>
CEIT_INLINE Vec<Acc> reciprocal(Vec<Acc> x) {
  return Acc(1) / x;
}
#if defined(__AVX512F__)
template <>
CEIT_INLINE Vec<float> smaller<float>(Vec<float> a, Vec<float> b) {
  return Vec<float>(_mm512_min_ps(__m512(a), __m512(b)));
}
template <>
CEIT_INLINE Vec<float> larger<float>(Vec<float> a, Vec<float> b) {
  return Vec<float>(_mm512_max_ps(__m512(a), __m512(b)));
}
template <>
CEIT_INLINE Vec<float> reciprocal<float>(Vec<float> x) {
  const auto guess = Vec<float>(_mm512_rcp14_ps(__m512(x)));
  return guess + guess * (1.0f - x * guess);
}
#elif defined(__AVX2__)
template <>
CEIT_INLINE Vec<float> smaller<float>(Vec<float> a, Vec<float> b) {
  return Vec<float>(_mm256_min_ps(__m256(a), __m256(b)));
}
template <>
CEIT_INLINE Vec<float> larger<float>(Vec<float> a, Vec<float> b) {
  return Vec<float>(_mm256_max_ps(__m256(a), __m256(b)));
}
#endif

// e^x within 2 units in the last place where the result is normal; beyond that e^-87 or e^88.
CEIT_INLINE Vec<float> exponential(Vec<float> x) {
  using L = Lanes<float>;
  x = smaller<float>(larger<float>(x, splat(-87.0f)), splat(88.0f));
  const auto shifted = x * 1.44269504f + 12582912.0f;  // rounds to an integer in the low bits
  const auto n = shifted - 12582912.0f;
  const auto r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  auto p = 1.98756915e-4f * r + 1.39819995e-3f;
  p = p * r + 8.33345192e-3f;
  p = p * r + 4.16657959e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  const auto exponent = reinterpret_cast<L::Ints>(shifted) << 23;
  return reinterpret_cast<Vec<float>>(reinterpret_cast<L::Ints>(p) + exponent);
}
CEIT_INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = std::exp(x[i]);
  return x;
}

// 2^x for an x of at most 0, within a unit in the last place; at most 2^-126 below that, and no number where x is none.
CEIT_INLINE Vec<float> power_of_two(Vec<float> x) {
#if defined(__AVX512F__)
  const auto n = Vec<float>(_mm512_roundscale_ps(__m512(x), 8));
  const auto r = Vec<float>(_mm512_reduce_ps(__m512(x), 8));  // x - n, and 0 for -infinity
#else
  using L = Lanes<float>;
  const auto bounded = larger<float>(x, splat(-126.0f));
  const auto shifted = bounded + 12582912.0f;  // rounds to an integer in the low bits
  const auto r = bounded - (shifted - 12582912.0f);
#endif
  // Fitted for the least relative error, 2e-9, up to a half.
  auto p = 1.53533576e-4f * r + 1.33988762e-3f;
  p = p * r + 9.61843785e-3f;
  p = p * r + 5.55033237e-2f;
  p = p * r + 2.40226477e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return Vec<float>(_mm512_scalef_ps(__m512(p), __m512(n)));
#else
  const auto exponent = reinterpret_cast<L::Ints>(shifted) << 23;
  const auto power = reinterpret_cast<Vec<float>>(reinterpret_cast<L::Ints>(p) + exponent);
  return x == x ? power : x;
#endif
}
CEIT_INLINE Vec<double> power_of_two(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// Memory of a range of tasks: zeros, aligned as vectors want it.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(::operator new(size_t(count) * sizeof(T), kAlignment))) {
    std::memset(static_cast<void*>(data_), 0, size_t(count) * sizeof(T));
  }
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit
