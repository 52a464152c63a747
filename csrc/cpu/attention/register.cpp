// Checks of self-attention's arguments on the CPU, and its registration. The schemas are in ceit_kernels/attention.
#include "../../tensors.h"
#include "../capability.h"
#include "calls.h"

namespace ceit::attention {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

namespace {

Shape shape_of(const Tensor& qkv, const Tensor& out, int64_t heads) {
  STD_TORCH_CHECK(qkv.dim() == 3 && heads > 0 && qkv.size(2) % (3 * heads) == 0, "qkv: expected (B, N, 3 * heads * D)");
  STD_TORCH_CHECK(out.dim() == 3 && out.size(1) <= qkv.size(1), "out: expected (B, queries, heads * D)");
  return {qkv.size(0), qkv.size(1), heads, qkv.size(2) / 3 / heads, out.size(1)};
}

void* statistics_of(const OptionalTensor& statistics, const Shape& shape, ScalarType acc) {
  return elements("statistics", statistics, shape.all_queries() * 2, acc);
}

// out (B, queries, heads * D) of qkv (B, N, 3 * heads * D), with what backward needs where it is wanted.
void forward(Tensor qkv, int64_t heads, double scale, Tensor out, OptionalTensor statistics) {
  ForwardCall call{};
  const Shape& shape = call.shape = shape_of(qkv, out, heads);
  call.scale = scale;
  call.qkv = elements("qkv", qkv, qkv.numel(), qkv.scalar_type());
  call.out = elements("out", out, shape.images * shape.queries * heads * shape.channels, qkv.scalar_type());
  call.statistics = statistics_of(statistics, shape, acc_dtype(qkv));
  run_tasks(chosen(dtype_index(qkv)).forward, call, shape.all_queries());
}

void backward(Tensor grad_out, Tensor qkv, Tensor statistics, int64_t heads, double scale, Tensor grad_qkv) {
  const ScalarType dtype = qkv.scalar_type();
  BackwardCall call{};
  const Shape& shape = call.shape = shape_of(qkv, grad_out, heads);
  call.scale = scale;
  call.grad_out = elements("grad_out", grad_out, shape.images * shape.queries * heads * shape.channels, dtype);
  call.qkv = elements("qkv", qkv, qkv.numel(), dtype);
  call.statistics = statistics_of(statistics, shape, acc_dtype(qkv));
  call.grad_qkv = elements("grad_qkv", grad_qkv, qkv.numel(), dtype);
  run_tasks(chosen(dtype_index(qkv)).backward, call, shape.images * heads);
}

}  // namespace
}  // namespace ceit::attention

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_attention", TORCH_BOX(&ceit::attention::forward));
  m.impl("_attention_backward", TORCH_BOX(&ceit::attention::backward));
}
