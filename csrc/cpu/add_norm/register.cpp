// Checks of add_norm's passes on the CPU and their registration, through libtorch's stable ABI. The schemas are
// in ceit_kernels/add_norm/cpu.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../capability.h"
#include "add_norm.h"
#include "calls.h"

namespace ceit::add_norm {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Elements that are worth a thread.
constexpr int64_t kGrain = 1 << 14;

const Kernels& kernels_for(ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Double,
                  "the kernels compute in float32, bfloat16 and float64");
  return chosen(type == ScalarType::Float ? 0 : type == ScalarType::BFloat16 ? 1 : 2);
}

// What parameters, statistics and sums are kept in.
ScalarType real_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

void* array(const char* name, const Tensor& tensor, int64_t elements, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": unexpected dtype");
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == elements, name, ": expected ", elements,
                  " contiguous elements, got ", tensor.numel());
  return tensor.data_ptr();
}
void* array(const char* name, const OptionalTensor& tensor, int64_t elements, ScalarType type) {
  return tensor ? array(name, *tensor, elements, type) : nullptr;
}

int64_t channels_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() > 0 && tensor.numel() > 0, "expected a tensor (..., channels) with at least one row");
  return tensor.size(tensor.dim() - 1);
}

int64_t blocks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

template <class Call>
void run(Kernel<Call> kernel, const Call& call) {
  const int64_t grain = 1 + kGrain / (kRows * call.channels);
  torch::stable::parallel_for(0, blocks_of(call.rows), grain,
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

}  // namespace

void forward(Tensor x, OptionalTensor branch, OptionalTensor weight, OptionalTensor bias, double eps,
             OptionalTensor total, Tensor out, OptionalTensor mean, OptionalTensor rstd) {
  const ScalarType type = x.scalar_type(), real = real_type(type);
  const int64_t elements = x.numel(), channels = channels_of(x), rows = elements / channels;
  STD_TORCH_CHECK(branch.has_value() == total.has_value(), "total: expected with branch");
  const ForwardCall call{rows,
                         channels,
                         array("x", x, elements, type),
                         array("branch", branch, elements, type),
                         array("weight", weight, channels, real),
                         array("bias", bias, channels, real),
                         eps,
                         array("total", total, elements, type),
                         array("out", out, elements, type),
                         array("mean", mean, rows, real),
                         array("rstd", rstd, rows, real)};
  run(kernels_for(type).forward, call);
}

namespace {

void backward(Tensor grad_out, OptionalTensor grad_total, OptionalTensor grad_prefix, Tensor total,
              OptionalTensor weight, Tensor mean, Tensor rstd, OptionalTensor grad, OptionalTensor partial) {
  const ScalarType type = total.scalar_type(), real = real_type(type);
  const int64_t elements = total.numel(), channels = channels_of(total), rows = elements / channels;
  int64_t tokens = 1, prefix = 0, prefix_elements = 0;
  if (grad_prefix) {
    STD_TORCH_CHECK(total.dim() == 3 && grad_prefix->dim() == 3 && grad_prefix->size(0) == total.size(0) &&
                        grad_prefix->size(1) <= total.size(1),
                    "grad_prefix: expected (B, P, channels) for a total (B, N, channels)");
    tokens = total.size(1), prefix = grad_prefix->size(1), prefix_elements = total.size(0) * prefix * channels;
  }
  const BackwardCall call{rows,
                          channels,
                          array("grad_out", grad_out, elements, type),
                          array("grad_total", grad_total, elements, type),
                          array("grad_prefix", grad_prefix, prefix_elements, type),
                          tokens,
                          prefix,
                          array("total", total, elements, type),
                          array("weight", weight, channels, real),
                          array("mean", mean, rows, real),
                          array("rstd", rstd, rows, real),
                          array("grad", grad, elements, type),
                          array("partial", partial, blocks_of(rows) * 2 * channels, real)};
  run(kernels_for(type).backward, call);
}

}  // namespace
}  // namespace ceit::add_norm

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_add_norm_forward", TORCH_BOX(&ceit::add_norm::forward));
  m.impl("_add_norm_backward", TORCH_BOX(&ceit::add_norm::backward));
}
