// The types that tensors are stored in. Code for different processors shares this file: functions have internal
// linkage.
#pragma once

#include <cstdint>

namespace ceit {

struct Bf16 {
  uint16_t bits;
};

// What sums of a type's elements are accumulated in.
template <class T>
struct Accumulator {
  using Type = T;
};
template <>
struct Accumulator<Bf16> {
  using Type = float;
};
template <class T>
using acc_t = typename Accumulator<T>::Type;

// In the order of ACTIVATIONS in ceit_kernels/leff/activations.py.
enum class Activation { gelu, gelu_tanh, silu, relu, relu6, hardswish, identity };

// Where a type's kernels are in the tables.
template <class T>
inline constexpr int kIndex = 0;
template <>
inline constexpr int kIndex<Bf16> = 1;
template <>
inline constexpr int kIndex<double> = 2;

// Runs a range of a call's tasks.
template <class Call>
using Kernel = void (*)(const Call&, int64_t begin, int64_t end);

static inline constexpr int64_t ceil_div(int64_t size, int64_t part) { return (size + part - 1) / part; }
static inline constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace ceit
