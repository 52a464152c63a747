// Which kind of code this processor runs, told to Python. The schema is in ceit_kernels/common/extension.py.
#include "capability.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace ceit {
namespace {

std::string cpu_code() { return name_of(capability()); }

}  // namespace
}  // namespace ceit

STABLE_TORCH_LIBRARY_IMPL(ceit, CompositeExplicitAutograd, m) { m.impl("_cpu_code", TORCH_BOX(&ceit::cpu_code)); }
