// Which kind of code this processor runs, told to Python. The schema is in ceit_kernels/common/extension.py.
#include "capability.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace ceit {
namespace {

std::string cpu_code() {
  switch (capability()) {
    case Capability::avx512: return "avx512";
    case Capability::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace
}  // namespace ceit

STABLE_TORCH_LIBRARY_IMPL(ceit, CompositeExplicitAutograd, m) { m.impl("_cpu_code", TORCH_BOX(&ceit::cpu_code)); }
