// What a residual connection with its LayerNorm takes on the CPU, and the table of its implementations.
//
// Tensors are contiguous matrices (rows, channels) of one type; parameters, statistics and sums are of the type that is
// computed in. A null pointer is an argument that is not there.
#pragma once

#include "../../types.h"

namespace ceit::add_norm {

// Rows of a task, and of one chain of additions down the rows.
constexpr int kTileRows = 32;

// total = x + branch, out = (total - mean) * rstd * weight + bias; without a branch x is the sum, and total is not
// written.
struct ForwardCall {
  int64_t rows, channels;
  const void *x, *branch;
  const void *weight, *bias;
  double eps;
  void *total, *out;
  void *mean, *rstd;  // of each row
};

// The gradient of the sum: that of the norm, + grad_total, + grad_prefix for the first `prefix` of every `tokens` rows.
struct BackwardCall {
  int64_t rows, channels;
  const void *grad_out, *grad_total, *grad_prefix;
  int64_t tokens, prefix;
  const void* total;
  const void* weight;
  const void *mean, *rstd;
  void* grad;
  void* scaled;  // factor * grad; or null
  double factor;
  void* partial;  // (tiles of kTileRows rows, 2, channels): what each tile adds to the gradients of weight and bias
};

// Each runs a range of tasks, tiles of kTileRows rows.
struct Kernels {
  Kernel<ForwardCall> forward;
  Kernel<BackwardCall> backward;
  Kernel<ForwardCall> forward_to_bf16;    // out of 16 bits, the rest of the type
  Kernel<BackwardCall> backward_to_bf16;  // likewise of scaled
};

}  // namespace ceit::add_norm
