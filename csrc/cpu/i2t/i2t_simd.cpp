// The table of one capability's kernels.
#include "backward.h"
#include "forward.h"

namespace ceit::i2t_cpu {
namespace CEIT_CAPABILITY {
namespace {

template <class T>
constexpr Kernels kernels_of() {
  return {forward<T>, normalise<T>, sums<T>, backward<T>};
}

}  // namespace

extern const Kernels kernels[3] = {kernels_of<float>(), kernels_of<Bf16>(), kernels_of<double>()};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::i2t_cpu
