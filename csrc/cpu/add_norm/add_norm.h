// A residual connection with its LayerNorm as a function of tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace ceit::add_norm {

// total = x + branch and out = its LayerNorm, with the statistics of its rows where they are wanted; calls.h says more.
void forward(torch::stable::Tensor x, std::optional<torch::stable::Tensor> branch,
             std::optional<torch::stable::Tensor> weight, std::optional<torch::stable::Tensor> bias, double eps,
             std::optional<torch::stable::Tensor> total, torch::stable::Tensor out,
             std::optional<torch::stable::Tensor> mean, std::optional<torch::stable::Tensor> rstd);

}  // namespace ceit::add_norm
