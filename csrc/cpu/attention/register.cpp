// Checks of self-attention on the CPU and its registration, through libtorch's stable ABI. The schemas are in
// ceit_kernels/attention/cpu.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../capability.h"
#include "attention.h"
#include "calls.h"

namespace ceit::attention {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& kernels_for(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Double,
                  "the kernels compute in float32, bfloat16 and float64");
  return chosen(type == ScalarType::Float ? 0 : type == ScalarType::BFloat16 ? 1 : 2);
}

Shape shape_of(const Tensor& qkv, const Tensor& out, int64_t heads) {
  STD_TORCH_CHECK(qkv.dim() == 3 && heads > 0 && qkv.size(2) % (3 * heads) == 0, "qkv: expected (B, N, 3 * heads * D)");
  STD_TORCH_CHECK(out.dim() == 3 && out.size(1) <= qkv.size(1), "out: expected (B, queries, heads * D)");
  return {qkv.size(0), qkv.size(1), heads, qkv.size(2) / 3 / heads, out.size(1)};
}

void* data(const char* name, const Tensor& tensor, int64_t elements, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": unexpected dtype");
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == elements, name, ": expected ", elements,
                  " contiguous elements, got ", tensor.numel());
  return tensor.data_ptr();
}

void* statistics_of(const Tensor& statistics, const Shape& shape, ScalarType type) {
  const ScalarType real = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return data("statistics", statistics, shape.images * shape.heads * shape.queries * 2, real);
}

}  // namespace

void forward(Tensor qkv, int64_t heads, double scale, Tensor out, std::optional<Tensor> statistics) {
  const ScalarType type = qkv.scalar_type();
  const Shape shape = shape_of(qkv, out, heads);
  const int64_t width = shape.heads * shape.channels;
  const ForwardCall call{shape, scale, data("qkv", qkv, shape.images * shape.tokens * 3 * width, type),
                         data("out", out, shape.images * shape.queries * width, type),
                         statistics ? statistics_of(*statistics, shape, type) : nullptr};
  const Kernels& table = kernels_for(qkv);
  torch::stable::parallel_for(0, shape.images * shape.heads * shape.blocks(), 1,
                              [&](int64_t begin, int64_t end) { table.forward(call, begin, end); });
}

namespace {

void backward(Tensor grad_out, Tensor qkv, Tensor statistics, int64_t heads, double scale, Tensor grad_qkv) {
  const ScalarType type = qkv.scalar_type();
  const Shape shape = shape_of(qkv, grad_out, heads);
  const int64_t width = shape.heads * shape.channels, elements = shape.images * shape.tokens * 3 * width;
  const BackwardCall call{shape,
                          scale,
                          data("grad_out", grad_out, shape.images * shape.queries * width, type),
                          data("qkv", qkv, elements, type),
                          statistics_of(statistics, shape, type),
                          data("grad_qkv", grad_qkv, elements, type)};
  const Kernels& table = kernels_for(qkv);
  torch::stable::parallel_for(0, shape.images * shape.heads, 1,
                              [&](int64_t begin, int64_t end) { table.backward(call, begin, end); });
}

}  // namespace
}  // namespace ceit::attention

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_attention", TORCH_BOX(&ceit::attention::forward));
  m.impl("_attention_backward", TORCH_BOX(&ceit::attention::backward));
}
