// The choice of the products with panels, and the memory beside them.
#include "panels.h"

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

bool has_panels(torch::stable::Tensor) { return available(); }

}  // namespace

bool available() { return capability() == Capability::avx512 && chosen(0).multiply != nullptr; }

void multiply(const Call& call, Range rows, Range panels) { chosen(0).multiply(call, rows, panels); }

float* floats(const char* name, const std::optional<torch::stable::Tensor>& tensor, int64_t elements) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == torch::headeronly::ScalarType::Float && tensor->is_contiguous() &&
                      tensor->numel() == elements,
                  name, ": expected ", elements, " contiguous elements of float32, got ", tensor->numel());
  return static_cast<float*>(tensor->data_ptr());
}

Call call(const torch::stable::Tensor& weight, const std::optional<torch::stable::Tensor>& bias, int64_t terms,
          int64_t columns) {
  const int64_t panels = panels_of(columns);
  STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) == panels && weight.size(1) == terms && weight.size(2) == kColumns,
                  "weight: expected panels (", panels, ", ", terms, ", ", kColumns, ")");
  Call call;
  call.terms = terms, call.columns = columns;
  call.b = floats("weight", weight, panels * terms * kColumns);
  call.b_stride = kColumns, call.b_panel = terms * kColumns;
  call.bias = floats("bias", bias, columns);
  return call;
}

float* workspace(int64_t count) {
  static thread_local Workspace memory;
  return memory.get(count);
}

}  // namespace ceit::panels

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) { m.impl("_has_panels", TORCH_BOX(&ceit::panels::has_panels)); }
