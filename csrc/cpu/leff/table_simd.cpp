// The table of one capability's kernels.
#include "../vector.h"
#include "depthwise_simd.h"
#include "rows_simd.h"

namespace ceit::leff {
namespace CEIT_CAPABILITY {

using ceit::CEIT_CAPABILITY::Bf16;

namespace {

template <class T>
constexpr Kernels table = {depthwise<T>, depthwise_backward<T>, moments<T>,   activate_rows<T>, activate_backward<T>,
                           sums<T>,      gradient<T>,           finish<T, T>, nullptr,          transpose<T>};

constexpr Kernels bf16_table() {
  Kernels kernels = table<Bf16>;
  kernels.finish_in_float = finish<Bf16, float>;
  return kernels;
}

}  // namespace

extern const Kernels kernels[3];
const Kernels kernels[3] = {table<float>, bf16_table(), table<double>};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::leff
