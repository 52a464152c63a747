// A linear layer on the CPU, its backward in float32, and their registration, through libtorch's stable ABI. The
// schemas are in ceit_kernels/common/matmul.py.
#include "../gemm/packing.h"
#include "../leff/stages.h"

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
  return gemm::floats(name, tensor, tensor.numel());
}

// Calls body for bands of rows, on all threads.
template <class T>
void multiply_by_bands(const gemm::Call<T>& call, int64_t rows) {
  torch::stable::parallel_for(0, rows, kRows / 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += kRows) gemm::multiply(call, row, std::min(end, row + kRows));
  });
}

template <class T>
gemm::Call<T> make_layer(int64_t columns, int64_t terms, gemm::Packer<T>& packer) {
  return packer.linear(columns, terms);
}

// x W^T + bias for x (M, K) and W (N, K); (M, N). Of weight and bias, or of what `pack_linear` made of them.
Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> packed, int64_t columns) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x: expected a contiguous matrix");
  const int64_t rows = x.size(0), terms = x.size(1);
  const Tensor out = new_empty(x, {rows, columns});
  gemm::with_type(x, [&](auto type) {
    using T = decltype(type);
    const auto make = [&](gemm::Packer<T>& packer) { return make_layer<T>(columns, terms, packer); };
    gemm::with_packed<T>({weight, bias}, packed, make, [&](gemm::Call<T> call) {
      call.a = gemm::elements<T>("x", x, rows * terms), call.a_stride = terms;
      call.out = gemm::elements<T>("out", out, rows * columns), call.out_stride = columns;
      multiply_by_bands(call, rows);
    });
  });
  return out;
}

Tensor pack_linear(Tensor weight, std::optional<Tensor> bias) {
  Tensor packed = weight;
  gemm::with_type(weight, [&](auto type) {
    using T = decltype(type);
    packed = gemm::packed_tensor<T>(weight, {weight, bias}, [&](gemm::Packer<T>& packer) {
      return make_layer<T>(weight.size(0), weight.size(1), packer);
    });
  });
  return packed;
}

// A B; (M, N).
Tensor matmul(Tensor a, Tensor b) {
  const int64_t rows = a.size(0), terms = a.size(1), columns = b.size(1);
  gemm::Call<float> call = gemm::call_of(matrix("b", b), columns, terms, columns);
  STD_TORCH_CHECK(b.size(0) == terms, "b: expected ", terms, " rows, got ", b.size(0));
  const Tensor out = new_empty(a, {rows, columns});
  call.a = matrix("a", a), call.a_stride = terms;
  call.out = matrix("out", out), call.out_stride = columns;
  multiply_by_bands(call, rows);
  return out;
}

// A^T B; (K, N), of the narrower (M, K) and the wider (M, N).
Tensor transposed_product(const Tensor& narrow, const Tensor& wide) {
  const int64_t terms = wide.size(0), rows = narrow.size(1), columns = wide.size(1);
  const Tensor out = new_empty(wide, {rows, columns});
  const float *from = matrix("narrow", narrow), *b = matrix("wide", wide);
  const int64_t bands = (terms + kRows - 1) / kRows, stride = leff::turned_stride(kRows);
  float *turned = gemm::workspace(bands * stride * rows), *to = matrix("out", out);
  torch::stable::parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t band = begin; band < end; ++band) {
      const int64_t first = band * kRows, count = std::min(kRows, terms - first);
      leff::transpose_rows(from + first * rows, count, rows, turned + band * stride * rows);
    }
  });
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, gemm::panels_of(columns) * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t band = 0; band < bands; ++band) {
      const int64_t first = band * kRows, count = std::min(kRows, terms - first);
      gemm::Call<float> call = gemm::call_of(b + first * columns, columns, count, columns);
      call.a = turned + band * stride * rows, call.a_stride = leff::turned_stride(count);
      call.out = to, call.out_stride = columns;
      call.accumulate = band > 0;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task / blocks, row = task % blocks * kBlock;
        gemm::multiply(call, gemm::Range{row, std::min(rows, row + kBlock)}, gemm::Range{panel, panel + 1});
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
  m.impl("_linear", TORCH_BOX(&ceit::linear_layer::linear));
  m.impl("_linear_pack", TORCH_BOX(&ceit::linear_layer::pack_linear));
  m.impl("_matmul", TORCH_BOX(&ceit::linear_layer::matmul));
  m.impl("_weight_gradient", TORCH_BOX(&ceit::linear_layer::weight_gradient));
}
