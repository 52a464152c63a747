// Arithmetic of single elements. Code for different processors shares this file: functions have internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

#include "../types.h"

namespace ceit {

static inline float value_of(float a) { return a; }
static inline double value_of(double a) { return a; }
static inline float value_of(Bf16 a) {
  const uint32_t word = uint32_t(a.bits) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

template <class T>
static inline T rounded(acc_t<T> value) {
  return value;
}
template <>
inline Bf16 rounded<Bf16>(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  if (value != value) return {0x7fc0};
  return {uint16_t((word + 0x7fffu + ((word >> 16) & 1u)) >> 16)};
}

template <class T>
static inline T sum_of(T a, T b) {
  return rounded<T>(value_of(a) + value_of(b));
}

}  // namespace ceit
