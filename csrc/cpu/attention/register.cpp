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
  const void* parts = elements("qkv", qkv, qkv.numel(), qkv.scalar_type());
  call.q = part_of(parts, shape, 0), call.k = part_of(parts, shape, 1), call.v = part_of(parts, shape, 2);
  call.out = elements("out", out, shape.images * shape.queries * heads * shape.channels, qkv.scalar_type());
  call.statistics = statistics_of(statistics, shape, acc_dtype(qkv));
  run_tasks(chosen(dtype_index(qkv)).forward, call, shape.all_queries());
}

// One of (images, heads, tokens, channels) whose channels lie side by side.
Operand operand(const char* name, const Tensor& x, const Shape& shape, int64_t tokens, ScalarType dtype) {
  const bool fits = x.dim() == 4 && x.size(0) == shape.images && x.size(1) == shape.heads && x.size(2) == tokens &&
                    x.size(3) == shape.channels && x.stride(3) == 1 && x.scalar_type() == dtype;
  STD_TORCH_CHECK(fits, name, ": expected (B, H, N, D) as of q, with its channels side by side");
  return {x.data_ptr(), 0, x.stride(0), x.stride(1), x.stride(2)};
}

// out (B, queries, H, D) of q (B, H, queries, D), k and v (B, H, N, D) and bias (H, queries, N), at inference.
void infer(Tensor q, Tensor k, Tensor v, OptionalTensor bias, double scale, Tensor out) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(3) > 0 && k.size(2) > 0, "q, k: expected (B, H, N, D)");
  const ScalarType dtype = q.scalar_type();
  ForwardCall call{};
  const Shape& shape = call.shape = {q.size(0), k.size(2), q.size(1), q.size(3), q.size(2)};
  call.scale = scale;
  call.q = operand("q", q, shape, shape.queries, dtype);
  call.k = operand("k", k, shape, shape.tokens, dtype);
  call.v = operand("v", v, shape, shape.tokens, dtype);
  call.bias = elements("bias", bias, shape.heads * shape.queries * shape.tokens, dtype);
  call.out = elements("out", out, shape.all_queries() * shape.channels, dtype);
  run_tasks(chosen(dtype_index(q)).forward, call, shape.all_queries());
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
  m.impl("_attention_infer", TORCH_BOX(&ceit::attention::infer));
  m.impl("_attention_backward", TORCH_BOX(&ceit::attention::backward));
}
