#include "gemm.h"

#include <memory>
#include <new>

#include "../capability.h"
#include "../scalar.h"
#include "packing.h"

namespace ceit::gemm {

CEIT_DECLARE_TABLE(Table, table, 1)

namespace {

template <class T>
const Kernels<T>& kernels() {
  const Table& all = chosen(0);
  if constexpr (std::is_same_v<T, float>)
    return all.of_float;
  else if constexpr (std::is_same_v<T, Bf16>)
    return all.of_bf16;
  else
    return all.of_double;
}

class Workspace {
 public:
  void* get(int64_t bytes) {
    if (bytes > bytes_) {
      data_.reset(), bytes_ = 0;
      data_.reset(::operator new(size_t(bytes), kAlignment)), bytes_ = bytes;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<void, Free> data_;
  int64_t bytes_ = 0;
};

}  // namespace

template <class T, class Out>
void multiply(const Call<T, Out>& call, Range rows, Range panels) {
  if (rows.begin >= rows.end) return;
  if constexpr (std::is_same_v<T, Out>)
    kernels<T>().multiply(call, rows, panels);
  else
    kernels<T>().multiply_to_acc(call, rows, panels);
}

template <class T>
int64_t packed_bytes(int64_t columns, int64_t depth) {
  return panels_of(columns) * kPanelColumns * depth * kernels<T>().packed_size(depth);
}

template <class T>
void pack(const Weight<T>& weight, void* packed) {
  torch::stable::parallel_for(0, panels_of(weight.columns), 1,
                              [&](int64_t begin, int64_t end) { kernels<T>().pack(weight, {begin, end}, packed); });
}

template <class T>
void transpose(const T* in, int64_t rows, int64_t columns, T* out) {
  transpose(in, columns, rows, columns, out, transposed_stride(rows));
}

template <class T>
void transpose(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out, int64_t out_stride) {
  kernels<T>().transpose(in, in_stride, rows, columns, out, out_stride);
}

Tensor transposed(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const Tensor out = new_empty(matrix, {columns, rows});
  with_dtype(matrix, [&](auto type) {
    using T = decltype(type);
    const T* in = elements<T>("matrix", matrix, rows * columns);
    T* to = static_cast<T*>(out.data_ptr());
    torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
      transpose(in + begin * columns, columns, end - begin, columns, to + begin, rows);
    });
  });
  return out;
}

#define CEIT_INSTANTIATE(T)                                         \
  template void multiply(const Call<T>&, Range, Range);             \
  template int64_t packed_bytes<T>(int64_t columns, int64_t depth); \
  template void pack(const Weight<T>&, void*);                      \
  template void transpose(const T*, int64_t, int64_t, T*);          \
  template void transpose(const T*, int64_t, int64_t, int64_t, T*, int64_t);
CEIT_INSTANTIATE(float)
CEIT_INSTANTIATE(Bf16)
CEIT_INSTANTIATE(double)
template void multiply(const Call<Bf16, float>&, Range, Range);

template <class Acc>
void read_vector(const char* name, const Tensor& tensor, int64_t count, Acc* to) {
  const Tensor whole = gemm::contiguous(tensor);
  with_dtype(whole, [&](auto type) {
    using From = decltype(type);
    const From* from = elements<From>(name, whole, count);
    for (int64_t i = 0; i < count; ++i) to[i] = Acc(value_of(from[i]));
  });
}
template void read_vector(const char*, const Tensor&, int64_t, float*);
template void read_vector(const char*, const Tensor&, int64_t, double*);

void* workspace(int64_t bytes) {
  static thread_local Workspace memory;
  return memory.get(bytes);
}

void* packing_workspace(int64_t bytes) {
  static thread_local Workspace memory;
  return memory.get(bytes);
}

void* task_workspace(int64_t bytes) {
  static thread_local Workspace memory;
  return memory.get(bytes);
}

}  // namespace ceit::gemm
