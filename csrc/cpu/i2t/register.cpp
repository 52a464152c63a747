// The check of the stem's pooling on the CPU and its registration, through libtorch's stable ABI. The schema is in
// ceit_kernels/i2t/native_cpu.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../capability.h"
#include "calls.h"

namespace ceit::i2t_cpu {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int type_index(ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Double,
                  "the kernels compute in float32, bfloat16 and float64");
  return type == ScalarType::Float ? 0 : type == ScalarType::BFloat16 ? 1 : 2;
}

void pool(Tensor in, Tensor out) {
  STD_TORCH_CHECK(in.dim() == 4 && in.is_contiguous(), "in: expected a contiguous tensor (B, H, W, channels)");
  STD_TORCH_CHECK(out.dim() == 4 && out.is_contiguous() && out.scalar_type() == in.scalar_type(),
                  "out: expected a contiguous tensor of in's dtype");
  const PoolCall call{in.data_ptr(), out.data_ptr(), in.size(1),  in.size(2),
                      in.size(3),    (in.size(1) - 1) / 2 + 1,    (in.size(2) - 1) / 2 + 1};
  STD_TORCH_CHECK(out.size(0) == in.size(0) && out.size(1) == call.pooled_height && out.size(2) == call.pooled_width &&
                      out.size(3) == call.channels,
                  "out: expected (", in.size(0), ", ", call.pooled_height, ", ", call.pooled_width, ", ", call.channels, ")");
  const Kernels& table = chosen(type_index(in.scalar_type()));
  torch::stable::parallel_for(0, in.size(0) * call.pooled_height, 1,
                              [&](int64_t begin, int64_t end) { table.pool(call, begin, end); });
}

}  // namespace
}  // namespace ceit::i2t_cpu

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) { m.impl("_i2t_pool", TORCH_BOX(&ceit::i2t_cpu::pool)); }
