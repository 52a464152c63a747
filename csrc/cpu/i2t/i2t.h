// The stem's forward pass as a function of tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace ceit::i2t_cpu {

// out (B, H', W', channels) of an image; calls.h says more.
void forward(torch::stable::Tensor image, torch::stable::Tensor weight, torch::stable::Tensor sign,
             std::optional<torch::stable::Tensor> norm, torch::stable::Tensor out,
             std::optional<torch::stable::Tensor> indices, std::optional<torch::stable::Tensor> moments);

}  // namespace ceit::i2t_cpu
