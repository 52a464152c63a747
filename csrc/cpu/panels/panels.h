// Weights packed in panels as tensors, and how the rows of images are shared between threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <optional>
#include <type_traits>

#include "calls.h"

namespace ceit::panels {

// Whether products with panels of a type are fast here: with AVX-512, for bfloat16 with its products, and a PyTorch that
// has them.
template <class T>
bool available();

// Some rows of a product, of some panels or all.
void multiply(const Call<float>& call, Range rows, Range panels);
void multiply(const Call<Bf16>& call, Range rows, Range panels);
template <class T>
void multiply(const Call<T>& call, int64_t begin, int64_t end) {
  multiply(call, Range{begin, end}, Range{0, panels_of(call.columns)});
}

// A weight (panels, terms, kColumns) of so many columns.
inline bool is_packed(const torch::stable::Tensor& weight) { return weight.dim() == 3; }

// The contiguous elements of a tensor, so many and of a type; null where there is none.
void* elements(const char* name, const std::optional<torch::stable::Tensor>& tensor, int64_t count,
               torch::headeronly::ScalarType type);
template <class T>
T* elements(const char* name, const std::optional<torch::stable::Tensor>& tensor, int64_t count) {
  using torch::headeronly::ScalarType;
  constexpr ScalarType type = std::is_same_v<T, Bf16> ? ScalarType::BFloat16 : ScalarType::Float;
  return static_cast<T*>(elements(name, tensor, count, type));
}
inline float* floats(const char* name, const std::optional<torch::stable::Tensor>& tensor, int64_t count) {
  return elements<float>(name, tensor, count);
}

// The product with such a weight (columns, terms) and a bias, but for its rows; checks the tensors.
template <class T>
Call<T> call(const torch::stable::Tensor& weight, const std::optional<torch::stable::Tensor>& bias, int64_t terms,
             int64_t columns);

// Memory of the calling thread that lives as long as it does: what a call needs is not taken from the system anew,
// which would zero it page by page.
float* workspace(int64_t count);

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

// `Call`'s B as it lies: (terms, columns), rows `stride` apart.
inline Call<float> call_of(const float* b, int64_t stride, int64_t terms, int64_t columns) {
  Call<float> call;
  call.terms = terms, call.columns = columns;
  call.b = b, call.b_stride = stride, call.b_panel = kColumns;
  return call;
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

}  // namespace ceit::panels
