// The types that tensors are stored in. No functions here: code for different processors shares this file.
#pragma once

#include <cstdint>

namespace ceit {

struct Bf16 {
  uint16_t bits;
};

// What a type's sums are accumulated in.
template <class T>
struct Accumulator {
  using Type = T;
};
template <>
struct Accumulator<Bf16> {
  using Type = float;
};
template <class T>
using AccOf = typename Accumulator<T>::Type;

// Where a type's kernels are in the tables.
template <class T>
inline constexpr int kIndex = 0;
template <>
inline constexpr int kIndex<Bf16> = 1;
template <>
inline constexpr int kIndex<double> = 2;

}  // namespace ceit
