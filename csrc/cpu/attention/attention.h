// Self-attention as a function of tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace ceit::attention {

// out (B, queries, heads * D) of qkv (B, N, 3 * heads * D), with what backward needs where it is wanted; calls.h says
// more.
void forward(torch::stable::Tensor qkv, int64_t heads, double scale, torch::stable::Tensor out,
             std::optional<torch::stable::Tensor> statistics);

}  // namespace ceit::attention
