// The steps of a block that inference and training share.
#pragma once

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
template <class Out>
void Norm<T>::operator()(const T* x, Out* out, int64_t begin, int64_t end, acc_t<T>* mean, acc_t<T>* rstd) const {
  add_norm::ForwardCall call = call_;
  call.rows = end - begin;
  call.x = x + begin * call.channels, call.out = out + begin * call.channels;
  if (mean) call.mean = mean + begin, call.rstd = rstd + begin;
  const add_norm::Kernels& kernels = add_norm::chosen(kIndex<T>);
  (std::is_same_v<T, Out> ? kernels.forward : kernels.forward_to_bf16)(call, 0,
                                                                       ceil_div(call.rows, add_norm::kTileRows));
}

// Attention of the first `queries` of `tokens` tokens of each image: attended (images, queries, channels); with the
// statistics that backward needs, where they are wanted.
template <class T, class Tokens, class Run>
void attend(const Attention<T, Tokens>& block, int64_t images, int64_t tokens, int64_t queries, int64_t channels,
            const T* qkv, T* attended, const Run& run, acc_t<T>* statistics = nullptr) {
  const int64_t heads = block.heads;
  STD_TORCH_CHECK(heads > 0 && channels % heads == 0, "heads: expected a divisor of ", channels, ", got ", heads);
  attention::ForwardCall call{};
  call.shape = {images, tokens, heads, channels / heads, queries};
  call.scale = block.scale, call.out = attended, call.statistics = statistics;
  call.q = attention::part_of(qkv, call.shape, 0), call.k = attention::part_of(qkv, call.shape, 1),
  call.v = attention::part_of(qkv, call.shape, 2);
  run(call.shape.all_queries(),
      [&](int64_t begin, int64_t end) { attention::chosen(kIndex<T>).forward(call, begin, end); });
}

}  // namespace ceit::block
