// GEMM of rows in cache with a matrix B that is prepacked in panels or read as it lies, and the table of its kernels.
//
// What follows a GEMM (norm, activation, residual) is its epilogue: it is done while the result is in cache, into
// memory that the caller gives.
#pragma once

#include <cstdint>

#include "../../types.h"

namespace ceit::gemm {

// Columns of a panel, the part of a result that a task has.
constexpr int kPanelColumns = 64;

// A B, and what follows it, but for the result.
template <class T>
struct Product {
  using Acc = acc_t<T>;
  const T* a = nullptr;
  int64_t a_stride = 0, depth = 0, columns = 0;
  // B (depth, columns): what `pack` made of it, or as it lies with rows `b_stride` apart.
  const void* b = nullptr;
  int64_t b_stride = 0;                          // 0 where it is prepacked
  const Acc *scale = nullptr, *shift = nullptr;  // (columns,); 1 and 0 where there is none
  Activation activation = Activation::identity;
  int64_t out_stride = 0;
  bool accumulate = false;
};

// out = activation(A B * scale + shift) + residual or, where out is of the type accumulated in, out += A B.
template <class T, class Out = T>
struct Call : Product<T> {
  const Out* residual = nullptr;  // with the rows of out
  Out* out = nullptr;
};

// A call of a product for a result, with a residual if there is one.
template <class T, class Out>
Call<T, Out> call_of(const Product<T>& product, const T* a, Out* out, const Out* residual = nullptr) {
  Call<T, Out> call;
  static_cast<Product<T>&>(call) = product;
  call.a = a, call.out = out, call.residual = residual;
  return call;
}

// A weight (columns, depth), row by row: B transposed; or B itself, (depth, columns).
template <class T>
struct Weight {
  const T* data;
  int64_t columns, depth;
  bool is_b = false;
};

inline int64_t panels_of(int64_t columns) { return ceil_div(columns, kPanelColumns); }

// Some rows, or some panels of B.
struct Range {
  int64_t begin, end;
};

template <class T>
struct Kernels {
  // Some rows of some panels of a result.
  void (*multiply)(const Call<T>&, Range rows, Range panels);
  void (*multiply_to_acc)(const Call<T, acc_t<T>>&, Range rows, Range panels);
  // Panels of B, each at its place in `packed`, which is for all of them.
  void (*pack)(const Weight<T>&, Range panels, void* packed);
  // Bytes of an element of a prepacked B of a depth.
  int64_t (*packed_size)(int64_t depth);
  // out (columns, rows) of a matrix (rows, columns), whose rows are so far apart.
  void (*transpose)(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out, int64_t out_stride);
};

struct Table {
  Kernels<float> of_float;
  Kernels<Bf16> of_bf16;
  Kernels<double> of_double;
};

}  // namespace ceit::gemm
