// GEMM with tensors: packing, memory, and how rows of images are shared between threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "calls.h"

namespace ceit::gemm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Some rows of a product, of some panels or all.
template <class T>
void multiply(const Call<T>& call, Range rows, Range panels);
template <class T>
void multiply(const Call<T>& call, int64_t begin, int64_t end) {
  multiply(call, Range{begin, end}, Range{0, panels_of(call.columns)});
}

// `Call`'s B as it lies: (terms, columns), rows `stride` apart.
template <class T>
Call<T> call_of(const T* b, int64_t stride, int64_t terms, int64_t columns) {
  Call<T> call;
  call.terms = terms, call.columns = columns;
  call.b = b, call.b_stride = stride;
  return call;
}

// Bytes of a weight (columns, terms) once it is packed, and the packing, on all threads.
template <class T>
int64_t packed_bytes(int64_t columns, int64_t terms);
template <class T>
void pack(const Weight<T>& weight, void* packed);
// The product with what was packed.
template <class T>
Call<T> packed_call(const void* packed, int64_t columns, int64_t terms) {
  Call<T> call;
  call.terms = terms, call.columns = columns, call.b = packed;
  return call;
}

template <class T>
inline constexpr ScalarType kType = ScalarType::Float;
template <>
inline constexpr ScalarType kType<Bf16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType kType<double> = ScalarType::Double;

// Calls body with a value of the type that a tensor has.
template <class Body>
void with_type(const Tensor& like, const Body& body) {
  const ScalarType type = like.scalar_type();
  if (type == ScalarType::Float) return body(float{});
  if (type == ScalarType::BFloat16) return body(Bf16{});
  STD_TORCH_CHECK(type == ScalarType::Double, "the kernels compute in float32, bfloat16 and float64, not in ",
                  torch::headeronly::toString(type));
  body(double{});
}

// The contiguous elements of a tensor, so many and of a type; null where there is none.
void* elements(const char* name, const OptionalTensor& tensor, int64_t count, ScalarType type);
template <class T>
T* elements(const char* name, const OptionalTensor& tensor, int64_t count) {
  return static_cast<T*>(elements(name, tensor, count, kType<T>));
}
inline float* floats(const char* name, const OptionalTensor& tensor, int64_t count) {
  return elements<float>(name, tensor, count);
}

inline Tensor contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Memory of the calling thread that lives as long as it does: what a call needs is not taken from the system anew,
// which would zero it page by page. A call has one workspace, which the next `workspace` may take away.
float* workspace(int64_t count);
// Another one, for what is packed for a call.
void* packing_workspace(int64_t bytes);

// Calls body(begin, end) for ranges of tasks, on all threads.
struct Threads {
  static constexpr bool alone = false;
  template <class Body>
  void operator()(int64_t tasks, const Body& body) const {
    torch::stable::parallel_for(0, tasks, 1, body);
  }
};

// The same on the calling thread.
struct Alone {
  static constexpr bool alone = true;
  template <class Body>
  void operator()(int64_t tasks, const Body& body) const {
    body(0, tasks);
  }
};

// The same for so few rows that threads share the panels.
template <class T, class Run>
void multiply_few(const Call<T>& call, int64_t rows, const Run& run) {
  run(panels_of(call.columns), [&](int64_t begin, int64_t end) { multiply(call, Range{0, rows}, Range{begin, end}); });
}

// Memory of several threads.
struct Memory {
  float* start;
  int64_t stride, threads;
  float* of(int64_t thread) const { return start + thread * stride; }
};

// Floats that take the memory of so many elements.
template <class T>
int64_t floats_for(int64_t elements) {
  return (elements * int64_t(sizeof(T)) + int64_t(sizeof(float)) - 1) / int64_t(sizeof(float));
}

// Where an image is worked on.
struct Place {
  int64_t thread;
  float* memory;
  bool first;  // the first image of this thread's memory
};

// Calls body(image, place, run) for every image, with `count` floats of memory: on a thread each as long as there are
// images for all, the rest one after another on all threads. `run` is Alone or Threads.
template <class Body>
Memory for_images(int64_t images, int64_t count, const Body& body) {
  const int64_t most = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t shared = images % most, each = images / most;
  Memory memory{nullptr, (count + 15) / 16 * 16, each ? most : 1};
  memory.start = workspace(memory.threads * memory.stride);
  if (each) {
    torch::stable::parallel_for(0, most, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread)
        for (int64_t i = 0; i < each; ++i) body(thread * each + i, Place{thread, memory.of(thread), i == 0}, Alone());
    });
  }
  for (int64_t image = images - shared; image < images; ++image)
    body(image, Place{0, memory.of(0), image == 0}, Threads());
  return memory;
}

}  // namespace ceit::gemm
