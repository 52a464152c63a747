// Tensors as compiled code takes them, through libtorch's stable ABI: contiguous elements of a dtype, checked.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "types.h"

namespace ceit {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
inline constexpr ScalarType kDtype = ScalarType::Float;
template <>
inline constexpr ScalarType kDtype<Bf16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType kDtype<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kDtype<uint8_t> = ScalarType::Byte;

// What sums, statistics and the parameters of norms are kept in.
inline ScalarType acc_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }
inline ScalarType acc_dtype(const Tensor& tensor) { return acc_dtype(tensor.scalar_type()); }

// Calls body(T()) with the type T of a tensor's elements, and returns what it returns.
template <class Body>
auto with_dtype(const Tensor& tensor, const Body& body) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Float) return body(float());
  if (dtype == ScalarType::BFloat16) return body(Bf16());
  STD_TORCH_CHECK(dtype == ScalarType::Double, "the kernels compute in float32, bfloat16 and float64, not in ",
                  torch::headeronly::toString(dtype));
  return body(double());
}

// Where a tensor's kernels are in the tables.
inline int dtype_index(const Tensor& tensor) {
  return with_dtype(tensor, [](auto type) { return kIndex<decltype(type)>; });
}

// The elements of a contiguous tensor of `count` of them and a dtype; null without a tensor.
inline void* elements(const char* name, const OptionalTensor& tensor, int64_t count, ScalarType dtype) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == dtype && tensor->is_contiguous() && tensor->numel() == count, name,
                  ": expected ", count, " contiguous elements of ", torch::headeronly::toString(dtype), ", got ",
                  tensor->numel(), " of ", torch::headeronly::toString(tensor->scalar_type()));
  return tensor->data_ptr();
}
template <class T>
T* elements(const char* name, const OptionalTensor& tensor, int64_t count) {
  return static_cast<T*>(elements(name, tensor, count, kDtype<T>));
}

// Runs a kernel's tasks on all threads, no fewer than `grain` on each.
template <class Call>
void run_tasks(void (*kernel)(const Call&, int64_t, int64_t), const Call& call, int64_t tasks, int64_t grain = 1) {
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

}  // namespace ceit
