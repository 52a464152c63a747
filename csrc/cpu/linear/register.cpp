// Products of a linear layer's training in float32 on the CPU and their registration, through libtorch's stable ABI. The
// schemas are in ceit_kernels/common/products.py.
#include "../leff/stages.h"
#include "../panels/panels.h"

namespace ceit::linear_layer {
namespace {

using torch::stable::new_empty;
using torch::stable::Tensor;

// Rows of a band, which stay in the second level of cache while all panels pass, and terms of a sum before the next
// columns. No power of two, as rows that far apart share few sets of the cache.
constexpr int64_t kRows = 216;
// Rows of a weight's gradient that a task has of a panel: enough tasks for threads to have as much to do each.
constexpr int64_t kBlock = 96;

float* matrix(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": expected a matrix");
  return panels::floats(name, tensor, tensor.numel());
}

// A B + bias; (M, N).
Tensor product(Tensor a, Tensor b, std::optional<Tensor> bias) {
  const int64_t rows = a.size(0), terms = a.size(1), columns = b.size(1);
  panels::Call<float> call = panels::call_of(matrix("b", b), columns, terms, columns);
  STD_TORCH_CHECK(b.size(0) == terms, "b: expected ", terms, " rows, got ", b.size(0));
  const Tensor out = new_empty(a, {rows, columns});
  call.a = matrix("a", a), call.a_stride = terms;
  call.out = matrix("out", out), call.out_stride = columns;
  call.bias = panels::floats("bias", bias, columns);
  torch::stable::parallel_for(0, rows, kRows / 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += kRows) panels::multiply(call, row, std::min(end, row + kRows));
  });
  return out;
}

// A^T B; (K, N), of the narrower (M, K) and the wider (M, N).
Tensor transposed_product(const Tensor& narrow, const Tensor& wide) {
  const int64_t terms = wide.size(0), rows = narrow.size(1), columns = wide.size(1);
  const Tensor out = new_empty(wide, {rows, columns});
  const float *from = matrix("narrow", narrow), *b = matrix("wide", wide);
  const int64_t bands = (terms + kRows - 1) / kRows, stride = leff::turned_stride(kRows);
  float *turned = panels::workspace(bands * stride * rows), *to = matrix("out", out);
  torch::stable::parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t band = begin; band < end; ++band) {
      const int64_t first = band * kRows, count = std::min(kRows, terms - first);
      leff::transpose_rows(from + first * rows, count, rows, turned + band * stride * rows);
    }
  });
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, panels::panels_of(columns) * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t band = 0; band < bands; ++band) {
      const int64_t first = band * kRows, count = std::min(kRows, terms - first);
      panels::Call<float> call = panels::call_of(b + first * columns, columns, count, columns);
      call.a = turned + band * stride * rows, call.a_stride = leff::turned_stride(count);
      call.out = to, call.out_stride = columns;
      call.add = band > 0;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task / blocks, row = task % blocks * kBlock;
        panels::multiply(call, panels::Range{row, std::min(rows, row + kBlock)}, panels::Range{panel, panel + 1});
      }
    }
  });
  return out;
}

// grad^T x, the gradient (N, K) of a weight.
Tensor weight_gradient(Tensor grad, Tensor x) {
  STD_TORCH_CHECK(grad.dim() == 2 && x.dim() == 2 && grad.size(0) == x.size(0), "grad, x: expected as many rows");
  if (grad.size(1) <= x.size(1)) return transposed_product(grad, x);
  const Tensor turned = transposed_product(x, grad);
  const Tensor out = new_empty(x, {turned.size(1), turned.size(0)});
  leff::transpose(turned, out);
  return out;
}

}  // namespace
}  // namespace ceit::linear_layer

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_product", TORCH_BOX(&ceit::linear_layer::product));
  m.impl("_weight_gradient", TORCH_BOX(&ceit::linear_layer::weight_gradient));
}
