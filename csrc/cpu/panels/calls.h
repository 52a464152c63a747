// Products of rows with weights that are packed in panels, and the table of their implementations.
//
// The product itself is oneDNN's brgemm, as PyTorch carries it: it multiplies what is in cache, on the thread that calls
// it, and into memory that is given to it. So what follows a product is done while its result is still there.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../types.h"

namespace ceit::panels {

// Columns of a panel.
constexpr int kColumns = 64;

// out = activation(a B + bias) + residual, or, in float32, out += a B. Panel p of B, some columns of all its rows, starts
// at b + p * b_panel: B is packed panel by panel, or, in float32, a matrix as it lies. In bfloat16 a panel has its rows in
// pairs, (terms / 2, kColumns, 2), and sums are float32.
template <class T>
struct Call {
  const T* a = nullptr;
  int64_t a_stride = 0, terms = 0, columns = 0;
  const T* b = nullptr;
  int64_t b_stride = 0, b_panel = 0;
  const T* bias = nullptr;  // (columns,)
  Activation activation = Activation::identity;
  const T* residual = nullptr;  // with the rows of out
  T* out = nullptr;
  int64_t out_stride = 0;
  bool add = false;
};

inline int64_t panels_of(int64_t columns) { return (columns + kColumns - 1) / kColumns; }

// Some rows, or some panels of a weight.
struct Range {
  int64_t begin, end;
};

template <class T>
using Multiply = void (*)(const Call<T>&, Range rows, Range panels);

struct Kernels {
  Multiply<float> multiply;
  Multiply<Bf16> multiply_bf16;
};

}  // namespace ceit::panels
