// A linear layer on the CPU, its backward, and their registration. The schemas are in
// ceit_kernels/common/matmul.py.
#include "../gemm/packing.h"

namespace ceit::linear_layer {
namespace {

// Rows of a tile, which stay in the second level of cache while all panels pass, and depth of a GEMM before the next
// columns. No power of two, as rows that far apart share few sets of the cache.
constexpr int64_t kTileRows = 216;
// Rows of a weight's gradient that a task has of a panel: enough tasks for threads to have as much to do each.
constexpr int64_t kTaskRows = 96;

template <class T>
T* matrix(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": expected a matrix");
  return elements<T>(name, tensor, tensor.numel());
}

// All of a result, tiles of rows on all threads; or panels, where the rows are few.
template <class T>
void multiply(const gemm::Call<T>& call, int64_t rows) {
  if (rows <= kTileRows / 4) return gemm::multiply_few(call, rows);
  torch::stable::parallel_for(0, rows, kTileRows / 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += kTileRows) gemm::multiply(call, row, std::min(end, row + kTileRows));
  });
}

// activation(x W^T + bias) for x (M, K) and W (N, K); (M, N). Of weight and bias, or of what `prepack_linear` made of
// them.
Tensor linear(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor prepacked, int64_t columns,
              int64_t activation) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected a matrix");
  const int64_t rows = x.size(0), depth = x.size(1);
  const Tensor out = new_empty(x, {rows, columns});
  with_dtype(x, [&](auto type) {
    using T = decltype(type);
    gemm::with_linear<T>(weight, bias, prepacked, columns, depth, [&](gemm::Call<T> call) {
      call.a = elements<T>("x", x, rows * depth);
      call.out = elements<T>("out", out, rows * columns);
      call.activation = gemm::activation_of(activation);
      multiply(call, rows);
    });
  });
  return out;
}

Tensor prepack_linear(Tensor weight, OptionalTensor bias) {
  return with_dtype(weight, [&](auto type) {
    using Packer = gemm::Packer<decltype(type)>;
    return gemm::prepack<decltype(type)>(weight, {weight, bias},
                                         [&](Packer& packer) { return packer.linear(weight.size(0), weight.size(1)); });
  });
}

// A B; (M, N).
Tensor matmul(Tensor a, Tensor b) {
  const int64_t rows = a.size(0), depth = a.size(1), columns = b.size(1);
  STD_TORCH_CHECK(b.size(0) == depth, "b: expected ", depth, " rows, got ", b.size(0));
  const Tensor out = new_empty(a, {rows, columns});
  with_dtype(a, [&](auto type) {
    using T = decltype(type);
    gemm::Call<T> call = gemm::unpacked_call(matrix<T>("b", b), columns, depth, columns);
    call.a = matrix<T>("a", a), call.a_stride = depth;
    call.out = matrix<T>("out", out), call.out_stride = columns;
    multiply(call, rows);
  });
  return out;
}

// A^T B; (K, N) in the type of sums, of the narrower (M, K) and the wider (M, N).
template <class T>
Tensor transposed_matmul(const Tensor& a, const Tensor& b) {
  using Acc = acc_t<T>;
  const int64_t depth = b.size(0), rows = a.size(1), columns = b.size(1);
  const Tensor out = new_empty(b, {rows, columns}, kDtype<Acc>);
  const T *from = matrix<T>("a", a), *right = matrix<T>("b", b);
  const int64_t tiles = ceil_div(depth, kTileRows), size = gemm::transposed_stride(kTileRows) * rows;
  T* a_t = static_cast<T*>(gemm::workspace(tiles * size * int64_t(sizeof(T))));
  Acc* to = matrix<Acc>("out", out);
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTileRows, count = std::min(kTileRows, depth - first);
      gemm::transpose(from + first * rows, count, rows, a_t + tile * size);
    }
  });
  const int64_t tasks = ceil_div(rows, kTaskRows);
  torch::stable::parallel_for(0, gemm::panels_of(columns) * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * kTileRows, count = std::min(kTileRows, depth - first);
      gemm::Call<T, Acc> call = gemm::unpacked_call<T, Acc>(right + first * columns, columns, count, columns);
      call.a = a_t + tile * size, call.a_stride = gemm::transposed_stride(count);
      call.out = to, call.out_stride = columns;
      call.accumulate = tile > 0;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task / tasks, row = task % tasks * kTaskRows;
        gemm::multiply(call, gemm::Range{row, std::min(rows, row + kTaskRows)}, gemm::Range{panel, panel + 1});
      }
    }
  });
  return out;
}

// grad^T x, the gradient (N, K) of a weight, in the type of sums.
Tensor weight_gradient(Tensor grad, Tensor x) {
  STD_TORCH_CHECK(grad.dim() == 2 && x.dim() == 2 && grad.size(0) == x.size(0), "grad, x: expected as many rows");
  return with_dtype(grad, [&](auto type) {
    using T = decltype(type);
    if (grad.size(1) <= x.size(1)) return transposed_matmul<T>(grad, x);
    return gemm::transposed(transposed_matmul<T>(x, grad));
  });
}

}  // namespace
}  // namespace ceit::linear_layer

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_linear", TORCH_BOX(&ceit::linear_layer::linear));
  m.impl("_linear_prepack", TORCH_BOX(&ceit::linear_layer::prepack_linear));
  m.impl("_matmul", TORCH_BOX(&ceit::linear_layer::matmul));
  m.impl("_weight_gradient", TORCH_BOX(&ceit::linear_layer::weight_gradient));
}
