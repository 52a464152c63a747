#include "gemm.h"

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
  ~Workspace() { release(); }
  void* get(int64_t bytes) {
    if (bytes > bytes_) {
      release();
      data_ = ::operator new(size_t(bytes), kAlignment);
      bytes_ = bytes;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void release() {
    ::operator delete(data_, kAlignment);
    data_ = nullptr, bytes_ = 0;
  }
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace

template <class T>
void multiply(const Call<T>& call, Range rows, Range panels) {
  if (rows.begin < rows.end) kernels<T>().multiply(call, rows, panels);
}

template <class T>
int64_t packed_bytes(int64_t columns, int64_t terms) {
  return panels_of(columns) * kColumns * terms * kernels<T>().packed_size(terms);
}

template <class T>
void pack(const Weight<T>& weight, void* packed) {
  torch::stable::parallel_for(0, panels_of(weight.columns), 1,
                              [&](int64_t begin, int64_t end) { kernels<T>().pack(weight, {begin, end}, packed); });
}

#define CEIT_INSTANTIATE(T)                                         \
  template void multiply(const Call<T>&, Range, Range);             \
  template int64_t packed_bytes<T>(int64_t columns, int64_t terms); \
  template void pack(const Weight<T>&, void*);
CEIT_INSTANTIATE(float)
CEIT_INSTANTIATE(Bf16)
CEIT_INSTANTIATE(double)

void* elements(const char* name, const OptionalTensor& tensor, int64_t count, ScalarType type) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == type && tensor->is_contiguous() && tensor->numel() == count, name,
                  ": expected ", count, " contiguous elements of ", torch::headeronly::toString(type), ", got ",
                  tensor->numel(), " of ", torch::headeronly::toString(tensor->scalar_type()));
  return tensor->data_ptr();
}

template <class Acc>
void read_vector(const char* name, const Tensor& tensor, int64_t count, Acc* to) {
  const Tensor whole = gemm::contiguous(tensor);
  with_type(whole, [&](auto type) {
    using From = decltype(type);
    const From* from = elements<From>(name, whole, count);
    for (int64_t i = 0; i < count; ++i) to[i] = Acc(value_of(from[i]));
  });
}
template void read_vector(const char*, const Tensor&, int64_t, float*);
template void read_vector(const char*, const Tensor&, int64_t, double*);

float* workspace(int64_t count) {
  static thread_local Workspace memory;
  return static_cast<float*>(memory.get(count * int64_t(sizeof(float))));
}

void* packing_workspace(int64_t bytes) {
  static thread_local Workspace memory;
  return memory.get(bytes);
}

}  // namespace ceit::gemm
