// Sums of single elements, for code that is compiled once for all processors.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

namespace ceit {

inline float sum_of(float a, float b) { return a + b; }

inline Bf16 sum_of(Bf16 a, Bf16 b) {
  const auto wide = [](Bf16 value) {
    const uint32_t word = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &word, sizeof result);
    return result;
  };
  const float sum = wide(a) + wide(b);
  uint32_t word;
  std::memcpy(&word, &sum, sizeof word);
  if (sum != sum) return {0x7fc0};
  return {uint16_t((word + 0x7fffu + ((word >> 16) & 1u)) >> 16)};
}

}  // namespace ceit
