// GEMM of rows in cache with weights packed in panels, and the table of its implementations.
//
// What follows a product (norm, activation, residual) is its epilogue: it is done while the result is in cache, into
// memory that the caller gives.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../types.h"

namespace ceit::gemm {

// Columns of a panel, the part of a product that a task has.
constexpr int kColumns = 64;

// out = activation(a B * scale + shift) + residual, or, where out is of the type accumulated in, out += a B. Sums,
// scale and shift are of the type accumulated in.
template <class T>
struct Call {
  using Acc = AccOf<T>;
  const T* a = nullptr;
  int64_t a_stride = 0, terms = 0, columns = 0;
  // B, packed by `pack`, or (terms, columns) as it lies with rows `b_stride` apart.
  const void* b = nullptr;
  int64_t b_stride = 0;                          // 0 where it is packed
  const Acc *scale = nullptr, *shift = nullptr;  // (columns,); 1 and 0 where there is none
  Activation activation = Activation::identity;
  const T* residual = nullptr;  // with the rows of out
  T* out = nullptr;
  int64_t out_stride = 0;
  bool accumulate = false;
};

// A weight (columns, terms), row by row.
template <class T>
struct Weight {
  const T* data;
  int64_t columns, terms;
};

inline int64_t panels_of(int64_t columns) { return (columns + kColumns - 1) / kColumns; }

// Some rows, or some panels of a weight.
struct Range {
  int64_t begin, end;
};

template <class T>
struct Kernels {
  // A part of a product.
  void (*multiply)(const Call<T>&, Range rows, Range panels);
  // Panels of B = W^T, each at its place in `packed`, which is for all of them.
  void (*pack)(const Weight<T>&, Range panels, void* packed);
  // Bytes of an element of a packed weight of so many terms.
  int64_t (*packed_size)(int64_t terms);
};

struct Table {
  Kernels<float> of_float;
  Kernels<Bf16> of_bf16;
  Kernels<double> of_double;
};

}  // namespace ceit::gemm
