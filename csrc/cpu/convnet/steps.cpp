// What stands between convolutional layers: LayerNorm, attention, upsampling, pooling.
#include "../add_norm/calls.h"
#include "../attention/calls.h"
#include "../capability.h"
#include "../scalar.h"
#include "net.h"

namespace ceit::add_norm {
CEIT_DECLARE_TABLE(Kernels, kernels, 3)
}
namespace ceit::attention {
CEIT_DECLARE_TABLE(Kernels, kernels, 3)
namespace mixed {
CEIT_DECLARE_TABLE(MixedKernels, kernels, 3)
}
}  // namespace ceit::attention

namespace ceit::convnet {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

template <class T>
Norm<T>::Norm(Numbers& numbers, gemm::Packer<T>& packer) : channels(numbers.next()), window(numbers.next()) {
  weight = packer.vector("norm.weight", channels, 1);
  bias = packer.vector("norm.bias", channels);
  eps = packer.vector("eps", 1);
}

template <class T>
template <class Run>
void Norm<T>::infer(const Maps& in, const Inputs<T>& x, T*, T* out, const Run& run) const {
  const int64_t width = in[0].width;
  STD_TORCH_CHECK(in[0].channels == channels, "sizes: a norm of ", channels, " channels gets ", in[0].channels);
  const auto rows = [&](int64_t from, int64_t to, int64_t count) {
    add_norm::ForwardCall call{};
    call.rows = count, call.channels = channels, call.weight = weight, call.bias = bias, call.eps = double(*eps);
    call.x = x.data[0] + from * channels, call.out = out + to * channels;
    add_norm::chosen(kIndex<T>).forward(call, 0, ceil_div(count, add_norm::kTileRows));
  };
  if (window == 0 || window == width)
    return run(in[0].pixels(), [&](int64_t begin, int64_t end) { rows(begin, begin, end - begin); });
  run(in[0].pixels() / window, [&](int64_t begin, int64_t end) {  // lines of windows
    for (int64_t line = begin; line < end; ++line) {
      const int64_t index = line / window, across = width / window;
      rows((index / across * window + line % window) * width + index % across * window, line * window, window);
    }
  });
}

template <class T>
Attention<T>::Attention(Numbers& numbers, gemm::Packer<T>& packer)
    : heads(numbers.next()),
      channels(numbers.next()),
      value_channels(numbers.next()),
      window(numbers.next()),
      queries(numbers.next()),
      keys(numbers.next()),
      mixes(numbers.next() != 0) {
  for (Part& part : parts) part.first = numbers.next(), part.head = numbers.next();
  STD_TORCH_CHECK(!window || !by_steps(), "sizes: no windows where heads are mixed");
  scale = packer.vector("scale", 1);
  if (queries) bias = packer.copy("bias", heads * queries * keys);
  if (!mixes) return;
  before = packer.vector("before", heads * heads);
  after = packer.vector("after", heads * heads);
  added = packer.vector("added", heads);
}

template <class T>
int64_t Attention<T>::memory(const Maps& in) const {
  if (!by_steps()) return 0;
  const int64_t elements = attention::scores_of(heads, in[0].pixels(), in[1].pixels());
  return elements * int64_t(sizeof(acc_t<T>) / sizeof(T));
}

template <class T>
template <class Run>
void Attention<T>::infer(const Maps& in, const Inputs<T>& x, T* memory, T* out, const Run& run) const {
  const int64_t side = window ? window * window : 0, images = window ? in[0].pixels() / side : 1;
  attention::Shape shape{images, in[1].pixels() / images, heads, channels, in[0].pixels() / images};
  STD_TORCH_CHECK(!queries || (queries == shape.queries && keys == shape.tokens), "sizes: biases of other maps");
  attention::Operand operands[3];
  for (size_t i = 0; i < 3; ++i) {
    const int64_t row = in[i].channels;
    operands[i] = {x.data[i], parts[i].first, in[i].pixels() / images * row, parts[i].head, row};
  }
  if (by_steps()) {
    attention::MixedCall call{shape, value_channels, double(*scale), operands[0], operands[1], operands[2],
                              bias,  before,         after,          added,       memory,      out};
    const attention::MixedKernels& kernels = attention::mixed::chosen(kIndex<T>);
    run(heads, [&](int64_t begin, int64_t end) { kernels.score(call, begin, end); });
    run(shape.queries, [&](int64_t begin, int64_t end) { kernels.softmax(call, begin, end); });
    return run(heads, [&](int64_t begin, int64_t end) { kernels.weigh(call, begin, end); });
  }
  attention::ForwardCall call{};
  call.shape = shape, call.scale = double(*scale), call.bias = bias, call.out = out;
  call.q = operands[0], call.k = operands[1], call.v = operands[2];
  if (window != in[0].width) call.window = window, call.width = in[0].width;
  run(shape.all_queries(), [&](int64_t begin, int64_t end) { attention::chosen(kIndex<T>).forward(call, begin, end); });
}

template <class T>
template <class Run>
void Upsample<T>::infer(const Maps& in, const Inputs<T>& x, T*, T* out, const Run& run) const {
  const UpsampleCall call{in[0].height, in[0].width, in[0].channels, int(factor), activation, x.data[0], out};
  run(in[0].height * factor, [&](int64_t begin, int64_t end) { chosen(kIndex<T>).upsample(call, begin, end); });
}

template <class T>
template <class Run>
void Pool<T>::infer(const Maps& in, const Inputs<T>& x, T* memory, T* out, const Run& run) const {
  using Acc = acc_t<T>;
  STD_TORCH_CHECK(in[0].channels == channels, "sizes: pooling of ", channels, " channels gets ", in[0].channels);
  const Acc* total = sum_pixels(in[0], x.data[0], memory, run);
  const Acc pixels = Acc(in[0].pixels());
  for (int64_t c = 0; c < channels; ++c) out[c] = rounded<T>(total[c] / pixels * scale[c] + shift[c]);
}

#define CEIT_INSTANTIATE_RUN(T, Run)                                                          \
  template void Norm<T>::infer(const Maps&, const Inputs<T>&, T*, T*, const Run&) const;      \
  template void Attention<T>::infer(const Maps&, const Inputs<T>&, T*, T*, const Run&) const; \
  template void Upsample<T>::infer(const Maps&, const Inputs<T>&, T*, T*, const Run&) const;  \
  template void Pool<T>::infer(const Maps&, const Inputs<T>&, T*, T*, const Run&) const;
#define CEIT_INSTANTIATE(T)            \
  template struct Norm<T>;             \
  template struct Attention<T>;        \
  template struct Upsample<T>;         \
  template struct Pool<T>;             \
  CEIT_INSTANTIATE_RUN(T, gemm::Alone) \
  CEIT_INSTANTIATE_RUN(T, gemm::Threads)
CEIT_INSTANTIATE(float)
CEIT_INSTANTIATE(Bf16)
CEIT_INSTANTIATE(double)

}  // namespace ceit::convnet
