// GEMM on pointers: packing, memory, and how rows of images are shared between threads.
#pragma once

#include <algorithm>

#include "../../tensors.h"
#include "calls.h"

namespace ceit::gemm {

// By its number; an error for any other.
inline Activation activation_of(int64_t index) {
  STD_TORCH_CHECK(index >= 0 && index <= int64_t(Activation::identity), "unknown activation ", index);
  return Activation(index);
}

// Some rows of a result, of some panels or all.
template <class T, class Out>
void multiply(const Call<T, Out>& call, Range rows, Range panels);
template <class T, class Out>
void multiply(const Call<T, Out>& call, int64_t begin, int64_t end) {
  multiply(call, Range{begin, end}, Range{0, panels_of(call.columns)});
}

// A call whose B (depth, columns) is read as it lies, with rows `stride` apart.
template <class T, class Out = T>
Call<T, Out> unpacked_call(const T* b, int64_t stride, int64_t depth, int64_t columns) {
  Call<T, Out> call;
  call.depth = depth, call.columns = columns;
  call.b = b, call.b_stride = stride;
  return call;
}

// Bytes of a weight (columns, depth) once it is prepacked, and the packing, on all threads.
template <class T>
int64_t packed_bytes(int64_t columns, int64_t depth);
template <class T>
void pack(const Weight<T>& weight, void* packed);

// Elements from one row to the next of a transposed matrix of so many rows: whole lines of the cache, and no large
// power of two of them, which would share few sets of it.
inline int64_t transposed_stride(int64_t rows) {
  const int64_t lines = ceil_div(rows, 16);
  return (lines % 4 == 0 ? lines + 1 : lines) * 16;
}
// out (columns, transposed_stride(rows)) of a matrix (rows, columns), on this thread.
template <class T>
void transpose(const T* in, int64_t rows, int64_t columns, T* out);
// The same of rows that are so far apart.
template <class T>
void transpose(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out, int64_t out_stride);
// A transposed contiguous matrix.
Tensor transposed(const Tensor& matrix);

// Memory handed out piece by piece; without any it only counts.
class Arena {
 public:
  explicit Arena(void* start = nullptr) : start_(static_cast<char*>(start)) {}
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * int64_t(sizeof(T))));
  }
  void* take_bytes(int64_t bytes) {
    char* at = start_ ? start_ + used_ : nullptr;
    used_ += ceil_div(bytes, 64) * 64;
    return at;
  }
  bool counts() const { return start_ == nullptr; }
  int64_t bytes() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

// Memory of the calling thread that lives as long as it does: what a call needs is not taken from the system anew,
// which would zero it page by page. A call has one workspace, which the next `workspace` may take away.
void* workspace(int64_t bytes);
// Another one, for what is prepacked for a call.
void* packing_workspace(int64_t bytes);
// Another one, for a task of a call on whichever thread has it.
void* task_workspace(int64_t bytes);

// Calls body(begin, end) for ranges of tasks, on all threads.
struct Threads {
  template <class Body>
  void operator()(int64_t tasks, const Body& body) const {
    torch::stable::parallel_for(0, tasks, 1, body);
  }
};

// The same on the calling thread.
struct Alone {
  template <class Body>
  void operator()(int64_t tasks, const Body& body) const {
    body(0, tasks);
  }
};

// All of a result with so few rows that threads share the panels.
template <class T, class Out>
void multiply_few(const Call<T, Out>& call, int64_t rows) {
  torch::stable::parallel_for(0, panels_of(call.columns), 1,
                              [&](int64_t begin, int64_t end) { multiply(call, Range{0, rows}, Range{begin, end}); });
}

// Memory of several threads.
struct Memory {
  char* start;
  int64_t stride, threads;
  void* of(int64_t thread) const { return start + thread * stride; }
};

// Where an image is worked on.
struct Place {
  int64_t thread;
  void* memory;
  bool first;  // the first image of this thread's memory
};

// Calls body(image, place, run) for every image, with so many bytes of memory: on a thread each as long as there are
// images for all, the rest one after another on all threads. `run` is Alone or Threads.
template <class Body>
Memory for_images(int64_t images, int64_t bytes, const Body& body) {
  const int64_t most = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t shared = images % most, each = images / most;
  Memory memory{nullptr, ceil_div(bytes, 64) * 64, each ? most : 1};
  memory.start = static_cast<char*>(workspace(memory.threads * memory.stride));
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
