// The choice of the products with panels, and the memory beside them.
#include "panels.h"

#include <exception>

#include "../capability.h"

namespace ceit::panels {

CEIT_DECLARE_TABLE(Kernels, kernels, 1)

namespace {

class Workspace {
 public:
  ~Workspace() { release(); }
  float* get(int64_t count) {
    if (count > count_) {
      release();
      data_ = static_cast<float*>(::operator new(size_t(count) * sizeof(float), kAlignment));
      count_ = count;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void release() {
    ::operator delete(data_, kAlignment);
    data_ = nullptr, count_ = 0;
  }
  float* data_ = nullptr;
  int64_t count_ = 0;
};

// Whether the processor multiplies bfloat16, and PyTorch does so by it: some ask for more than AVX512-BF16.
bool multiplies_bf16() {
#if defined(CEIT_HAS_AVX512)
  if (!__builtin_cpu_supports("avx512bf16")) return false;
  const Bf16 row[2] = {}, panel[2 * kColumns] = {};
  Bf16 out[kColumns];
  Call<Bf16> call;
  call.a = row, call.b = panel, call.out = out;
  call.terms = call.a_stride = 2, call.columns = call.b_stride = call.out_stride = kColumns;
  try {
    chosen(0).multiply_bf16(call, {0, 1}, {0, 1});
  } catch (const std::exception&) {
    return false;
  }
  return true;
#else
  return false;
#endif
}

}  // namespace

template <>
bool available<float>() {
  return capability() == Capability::avx512 && chosen(0).multiply != nullptr;
}
template <>
bool available<Bf16>() {
  static const bool does = capability() == Capability::avx512 && chosen(0).multiply_bf16 != nullptr && multiplies_bf16();
  return does;
}

void multiply(const Call<float>& call, Range rows, Range panels) { chosen(0).multiply(call, rows, panels); }
void multiply(const Call<Bf16>& call, Range rows, Range panels) { chosen(0).multiply_bf16(call, rows, panels); }

void* elements(const char* name, const std::optional<torch::stable::Tensor>& tensor, int64_t count,
               torch::headeronly::ScalarType type) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == type && tensor->is_contiguous() && tensor->numel() == count, name,
                  ": expected ", count, " contiguous elements of ", torch::headeronly::toString(type), ", got ",
                  tensor->numel(), " of ", torch::headeronly::toString(tensor->scalar_type()));
  return tensor->data_ptr();
}

template <class T>
Call<T> call(const torch::stable::Tensor& weight, const std::optional<torch::stable::Tensor>& bias, int64_t terms,
             int64_t columns) {
  constexpr int64_t together = std::is_same_v<T, Bf16> ? 2 : 1;
  const int64_t panels = panels_of(columns), rows = terms / together, row = kColumns * together;
  STD_TORCH_CHECK(terms % together == 0 && weight.dim() == 3 && weight.size(0) == panels && weight.size(1) == rows &&
                      weight.size(2) == row,
                  "weight: expected panels (", panels, ", ", rows, ", ", row, ") of ", terms, " terms");
  Call<T> call;
  call.terms = terms, call.columns = columns;
  call.b = elements<T>("weight", weight, panels * terms * kColumns);
  call.b_stride = kColumns, call.b_panel = terms * kColumns;
  call.bias = elements<T>("bias", bias, columns);
  return call;
}

template Call<float> call(const torch::stable::Tensor&, const std::optional<torch::stable::Tensor>&, int64_t, int64_t);
template Call<Bf16> call(const torch::stable::Tensor&, const std::optional<torch::stable::Tensor>&, int64_t, int64_t);

float* workspace(int64_t count) {
  static thread_local Workspace memory;
  return memory.get(count);
}

namespace {

bool has_panels(torch::stable::Tensor like) {
  return like.scalar_type() == torch::headeronly::ScalarType::BFloat16 ? available<Bf16>() : available<float>();
}

}  // namespace
}  // namespace ceit::panels

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) { m.impl("_has_panels", TORCH_BOX(&ceit::panels::has_panels)); }
