// Products of rows with weights that are packed in panels, and the table of their implementations.
//
// The product itself is oneDNN's brgemm, as PyTorch carries it: it multiplies what is in cache, on the thread that calls
// it, and into memory that is given to it. So what follows a product is done while its result is still there.
#pragma once

#include <cstdint>

#include "../activation.h"

namespace ceit::panels {

// Columns of a panel.
constexpr int kColumns = 64;

// out = activation(a B + bias) + residual, or out += a B; float32. Panel p of B, some columns of all its rows, starts at
// b + p * b_panel: B is packed panel by panel, or a matrix as it lies.
struct Call {
  const float* a = nullptr;
  int64_t a_stride = 0, terms = 0, columns = 0;
  const float* b = nullptr;
  int64_t b_stride = 0, b_panel = 0;
  const float* bias = nullptr;  // (columns,)
  Activation activation = Activation::identity;
  const float* residual = nullptr;  // with the rows of out
  float* out = nullptr;
  int64_t out_stride = 0;
  bool add = false;
};

inline int64_t panels_of(int64_t columns) { return (columns + kColumns - 1) / kColumns; }

// Some rows, or some panels of a weight.
struct Range {
  int64_t begin, end;
};

struct Kernels {
  void (*multiply)(const Call&, Range rows, Range panels);
};

}  // namespace ceit::panels
