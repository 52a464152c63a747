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

// out = activation(a W^T + bias) + residual; float32.
struct Call {
  const float* a;
  int64_t a_stride, terms, columns;
  const float* weight;  // (panels, terms, kColumns), the last filled up with zeros
  const float* bias;    // (columns,) or null
  Activation activation;
  const float* residual;  // with the rows of out, or null
  float* out;
  int64_t out_stride;
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
