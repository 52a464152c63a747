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

static inline float sum_of(float a, float b) { return a + b; }
static inline double sum_of(double a, double b) { return a + b; }
static inline Bf16 sum_of(Bf16 a, Bf16 b) {
  const float sum = value_of(a) + value_of(b);
  uint32_t word;
  std::memcpy(&word, &sum, sizeof word);
  if (sum != sum) return {0x7fc0};
  return {uint16_t((word + 0x7fffu + ((word >> 16) & 1u)) >> 16)};
}

}  // namespace ceit
