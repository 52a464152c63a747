// Checks of add_norm's arguments on the CPU, and its registration. The schemas are in ceit_kernels/add_norm.
#include "../../tensors.h"
#include "../capability.h"
#include "calls.h"

namespace ceit::add_norm {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

namespace {

// Elements that are worth a thread.
constexpr int64_t kGrain = 1 << 14;

int64_t channels_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() > 0 && tensor.numel() > 0, "expected a tensor (..., channels) with at least one row");
  return tensor.size(tensor.dim() - 1);
}

template <class Call>
void run(Kernel<Call> kernel, const Call& call) {
  run_tasks(kernel, call, ceil_div(call.rows, kTileRows), 1 + kGrain / (kTileRows * call.channels));
}

void forward(Tensor x, OptionalTensor branch, OptionalTensor weight, OptionalTensor bias, double eps,
             OptionalTensor total, Tensor out, OptionalTensor mean, OptionalTensor rstd) {
  const ScalarType dtype = x.scalar_type(), acc = acc_dtype(x);
  const int64_t count = x.numel();
  STD_TORCH_CHECK(branch.has_value() == total.has_value(), "total: expected with branch");
  ForwardCall call{};
  call.channels = channels_of(x), call.rows = count / call.channels;
  call.x = elements("x", x, count, dtype), call.branch = elements("branch", branch, count, dtype);
  call.weight = elements("weight", weight, call.channels, acc);
  call.bias = elements("bias", bias, call.channels, acc);
  call.eps = eps;
  call.total = elements("total", total, count, dtype), call.out = elements("out", out, count, dtype);
  call.mean = elements("mean", mean, call.rows, acc), call.rstd = elements("rstd", rstd, call.rows, acc);
  run(chosen(dtype_index(x)).forward, call);
}

void backward(Tensor grad_out, OptionalTensor grad_total, OptionalTensor grad_prefix, Tensor total,
              OptionalTensor weight, Tensor mean, Tensor rstd, OptionalTensor grad, OptionalTensor partial) {
  const ScalarType dtype = total.scalar_type(), acc = acc_dtype(total);
  const int64_t count = total.numel();
  BackwardCall call{};
  call.channels = channels_of(total), call.rows = count / call.channels;
  call.tokens = 1;
  if (grad_prefix) {
    STD_TORCH_CHECK(total.dim() == 3 && grad_prefix->dim() == 3 && grad_prefix->size(0) == total.size(0) &&
                        grad_prefix->size(1) <= total.size(1),
                    "grad_prefix: expected (B, P, channels) for a total (B, N, channels)");
    call.tokens = total.size(1), call.prefix = grad_prefix->size(1);
    call.grad_prefix = elements("grad_prefix", grad_prefix, total.size(0) * call.prefix * call.channels, dtype);
  }
  call.grad_out = elements("grad_out", grad_out, count, dtype);
  call.grad_total = elements("grad_total", grad_total, count, dtype);
  call.total = elements("total", total, count, dtype);
  call.weight = elements("weight", weight, call.channels, acc);
  call.mean = elements("mean", mean, call.rows, acc), call.rstd = elements("rstd", rstd, call.rows, acc);
  call.grad = elements("grad", grad, count, dtype);
  call.partial = elements("partial", partial, ceil_div(call.rows, kTileRows) * 2 * call.channels, acc);
  run(chosen(dtype_index(total)).backward, call);
}

}  // namespace
}  // namespace ceit::add_norm

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_add_norm_forward", TORCH_BOX(&ceit::add_norm::forward));
  m.impl("_add_norm_backward", TORCH_BOX(&ceit::add_norm::backward));
}
