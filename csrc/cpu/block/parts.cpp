// What blocks are made of.
#include "../capability.h"
#include "block.h"

namespace ceit::add_norm {
CEIT_DECLARE_TABLE(Kernels, kernels, 3)
}
namespace ceit::attention {
CEIT_DECLARE_TABLE(Kernels, kernels, 3)
}

namespace ceit::block {

template <class T>
Norm<T>::Norm(int64_t channels, double eps, gemm::Packer<T>& packer) {
  call_.channels = channels, call_.eps = eps;
  call_.weight = packer.vector("norm.weight", channels, 1);
  call_.bias = packer.vector("norm.bias", channels);
}

template <class T>
void Norm<T>::operator()(const T* x, T* out, int64_t begin, int64_t end) const {
  add_norm::ForwardCall call = call_;
  call.rows = end - begin;
  call.x = x + begin * call.channels, call.out = out + begin * call.channels;
  add_norm::chosen(kIndex<T>).forward(call, 0, (call.rows + add_norm::kTileRows - 1) / add_norm::kTileRows);
}

template <class T>
attention::ForwardCall attention_call(int64_t images, int64_t tokens, int64_t queries, int64_t channels, int64_t heads,
                                      double scale, const T* qkv, T* attended) {
  STD_TORCH_CHECK(heads > 0 && channels % heads == 0, "heads: expected a divisor of ", channels, ", got ", heads);
  attention::ForwardCall call{};
  call.shape = {images, tokens, heads, channels / heads, queries};
  call.scale = scale, call.qkv = qkv, call.out = attended;
  return call;
}

template <class T>
void attend(const attention::ForwardCall& call, int64_t begin, int64_t end) {
  attention::chosen(kIndex<T>).forward(call, begin, end);
}

#define CEIT_INSTANTIATE(T)                                                                                          \
  template class Norm<T>;                                                                                            \
  template attention::ForwardCall attention_call(int64_t, int64_t, int64_t, int64_t, int64_t, double, const T*, T*); \
  template void attend<T>(const attention::ForwardCall&, int64_t, int64_t);
CEIT_INSTANTIATE(float)
CEIT_INSTANTIATE(Bf16)
CEIT_INSTANTIATE(double)

}  // namespace ceit::block
