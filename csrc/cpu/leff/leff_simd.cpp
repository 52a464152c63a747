// The table of one capability's kernels.
#include "depthwise.h"
#include "rows.h"

namespace ceit::leff {
namespace CEIT_CAPABILITY {
namespace {

template <class T>
constexpr Kernels kernels_of(Kernel<FinishCall> finish_in_float = nullptr) {
  return {depthwise<T>,     depthwise_backward<T>, moments<T>,   activate_backward<T>, sums<T>,
          activate_rows<T>, gradient<T>,           finish<T, T>, finish_in_float};
}

}  // namespace

extern const Kernels kernels[3] = {kernels_of<float>(), kernels_of<Bf16>(finish<Bf16, float>), kernels_of<double>()};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::leff
