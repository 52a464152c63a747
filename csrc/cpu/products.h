// Whole matrix products, by the library that PyTorch carries: for training in bfloat16 and float64, which the bands of
// training_bands.h do not serve.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

// oneDNN's product; not there where PyTorch is built without oneDNN.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attribute, const double** scalars,
    int64_t scalars_length, const char** algorithm, AtenTensorHandle* result);

namespace ceit {

// Whether oneDNN multiplies matrices of a type here.
inline bool has_onednn(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  if (aoti_torch_cpu__linear_pointwise == nullptr) return false;
  static const bool has_bfloat16 = [] {
    StableIValue result{};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_is_mkldnn_bf16_supported", "", &result, TORCH_ABI_VERSION));
    return torch::stable::detail::to<bool>(result);
  }();
  return type == ScalarType::Float || (type == ScalarType::BFloat16 && has_bfloat16);
}

// x W^T + b for a contiguous x (M, K) and a weight (N, K), packed or not and of any strides; (M, N).
//
// A transposed view costs nothing: what oneDNN likes best to read is W^T.
inline torch::stable::Tensor linear(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                                    const std::optional<torch::stable::Tensor>& bias) {
  if (has_onednn(x.scalar_type())) {
    AtenTensorHandle of_bias = bias ? bias->get() : nullptr, result = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(x.get(), weight.get(), bias ? &of_bias : nullptr, "none",
                                                            nullptr, 0, nullptr, &result));
    return torch::stable::Tensor(result);
  }
  StableIValue stack[] = {torch::stable::detail::from(x), torch::stable::detail::from(weight),
                          torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

// A B + bias for contiguous matrices (M, K) and (K, N); (M, N).
inline torch::stable::Tensor product(const torch::stable::Tensor& a, const torch::stable::Tensor& b,
                                     const std::optional<torch::stable::Tensor>& bias = std::nullopt) {
  return linear(a, torch::stable::transpose(b, 0, 1), bias);
}

}  // namespace ceit
