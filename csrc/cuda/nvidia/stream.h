// Where the registered operators run: on a CUDA device, in PyTorch's stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../../tensors.h"

#define CEIT_DISPATCH_KEY CUDA

namespace ceit {

constexpr bool kComputesInDouble = false;

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline void* stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

}  // namespace ceit
