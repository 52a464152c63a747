// Encoder blocks. All tokens: four steps an image, each on rows that stay with their thread. The class token alone:
// keys and values of all tokens, and of the rest one row an image.
#include <vector>

#include "../capability.h"
#include "../scalar.h"
#include "block.h"

namespace ceit::add_norm {
CEIT_DECLARE_TABLE(Kernels, kernels, 3)
}
namespace ceit::attention {
CEIT_DECLARE_TABLE(Kernels, kernels, 3)
}

namespace ceit::block {
namespace {

// An image's memory.
template <class T>
struct Memory {
  T *normalised, *qkv, *attended, *total, *leff;
  Memory(T* start, int64_t elements)
      : normalised(start),
        qkv(start + elements),
        attended(start + 4 * elements),
        total(start + 5 * elements),
        leff(start + 6 * elements) {}
};

template <class T>
gemm::Call<T> with_rows(gemm::Call<T> call, const T* a, T* out, const T* residual = nullptr) {
  call.a = a, call.out = out, call.residual = residual;
  return call;
}

// Attention of the first `queries` of `tokens` tokens of each image: attended (images, queries, channels).
template <class T, class Run>
void attend(const Attention<T>& block, int64_t images, int64_t tokens, int64_t queries, int64_t channels, const T* qkv,
            T* attended, const Run& run) {
  const int64_t heads = block.heads;
  STD_TORCH_CHECK(heads > 0 && channels % heads == 0, "heads: expected a divisor of ", channels, ", got ", heads);
  attention::ForwardCall call{};
  call.shape = {images, tokens, heads, channels / heads, queries};
  call.scale = block.scale, call.qkv = qkv, call.out = attended;
  run(call.shape.all_queries(),
      [&](int64_t begin, int64_t end) { attention::chosen(kIndex<T>).forward(call, begin, end); });
}

// One row an image: the token that asks, what attention gives it, their sum and its norm.
template <class T>
class ClassTokens {
 public:
  ClassTokens(int64_t images, int64_t channels)
      : images_(images), channels_(channels), memory_(size_t(4 * images * channels)) {}
  void ask(int64_t image, const T* token) { std::copy(token, token + channels_, row(0, image)); }
  T* attended(int64_t image) { return row(1, image); }
  T* total() { return row(2, 0); }
  T* normalised() { return row(3, 0); }
  void add_attention(const Attention<T>& block) {
    gemm::multiply_few(with_rows<T>(block.projection, attended(0), total(), row(0, 0)), images_);
    block.norm2(total(), normalised(), 0, images_);
  }

 private:
  T* row(int64_t part, int64_t image) { return memory_.data() + (part * images_ + image) * channels_; }
  int64_t images_, channels_;
  std::vector<T> memory_;
};

}  // namespace

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
  add_norm::chosen(kIndex<T>).forward(call, 0, ceil_div(call.rows, add_norm::kTileRows));
}

template <class T>
void infer_encoder(const Encoder<T>& encoder, int64_t images, int64_t rows, const T* x, T* out) {
  const Attention<T>& block = encoder.attention;
  const leff::Inference<T>& leff = encoder.leff;
  const int64_t channels = leff.channels, elements = rows * channels;
  const int64_t bytes = (6 * elements + leff.memory()) * int64_t(sizeof(T));
  gemm::for_images(images, bytes, [&](int64_t image, gemm::Place place, auto run) {
    const Memory<T> memory(static_cast<T*>(place.memory), elements);
    const T* in = x + image * elements;
    run(rows, [&](int64_t begin, int64_t end) {
      block.norm1(in, memory.normalised, begin, end);
      gemm::multiply(with_rows<T>(block.qkv, memory.normalised, memory.qkv), begin, end);
    });
    attend<T>(block, 1, rows, rows, channels, memory.qkv, memory.attended, run);
    run(rows, [&](int64_t begin, int64_t end) {
      gemm::multiply(with_rows<T>(block.projection, memory.attended, memory.total, in), begin, end);
      block.norm2(memory.total, memory.normalised, begin, end);
      leff.expand(memory.normalised, memory.leff, std::max<int64_t>(0, begin - leff.prefix), end - leff.prefix);
    });
    run(leff.height, [&](int64_t begin, int64_t end) {
      leff.contract(memory.normalised, memory.total, memory.leff, out + image * elements, begin, end);
    });
  });
}

template <class T>
void infer_class_token(const Attention<T>& block, int64_t images, int64_t rows, int64_t channels, const T* x,
                       Rows<T> out) {
  const int64_t elements = rows * channels;
  ClassTokens<T> tokens(images, channels);
  gemm::for_images(images, 4 * elements * int64_t(sizeof(T)), [&](int64_t image, gemm::Place place, auto run) {
    T* memory = static_cast<T*>(place.memory);
    const T* in = x + image * elements;
    tokens.ask(image, in);
    const gemm::Call<T> qkv = with_rows<T>(block.qkv, memory, memory + elements);
    // Panels with a column of keys or values of all rows, and those of queries, which may share one, of the first.
    const gemm::Range keys_and_values{channels / gemm::kPanelColumns, gemm::panels_of(3 * channels)};
    run(rows, [&](int64_t begin, int64_t end) {
      block.norm1(in, memory, begin, end);
      gemm::multiply(qkv, gemm::Range{begin, end}, keys_and_values);
      if (begin == 0) gemm::multiply(qkv, gemm::Range{0, 1}, gemm::Range{0, gemm::panels_of(channels)});
    });
    attend<T>(block, 1, rows, 1, channels, qkv.out, tokens.attended(image), run);
  });
  tokens.add_attention(block);
  for (int64_t i = 0; i < images * channels; ++i)
    out.of(i / channels)[i % channels] = sum_of(tokens.total()[i], tokens.normalised()[i]);
}

template <class T>
void infer_layers(const Layers<T>& layer, int64_t images, int64_t layers, const T* x, T* out) {
  const Attention<T>& block = layer.attention;
  const int64_t channels = layer.channels, rows = images * layers, elements = rows * channels;
  ClassTokens<T> tokens(images, channels);
  const int64_t bytes = (4 * elements + images * layer.expanding.columns) * int64_t(sizeof(T));
  T *memory = static_cast<T*>(gemm::workspace(bytes)), *hidden = memory + 4 * elements;
  for (int64_t image = 0; image < images; ++image) {
    // Attention's queries are the first tokens, so the last goes ahead of the others.
    const T *in = x + image * layers * channels, *last = in + (layers - 1) * channels;
    T* reordered = memory + elements + image * layers * channels;
    tokens.ask(image, last);
    std::copy(last, last + channels, reordered);
    std::copy(in, last, reordered + channels);
  }
  block.norm1(memory + elements, memory, 0, rows);
  gemm::multiply_few(with_rows<T>(block.qkv, memory, memory + elements), rows);
  attend<T>(block, images, layers, 1, channels, memory + elements, tokens.attended(0), gemm::Threads());
  tokens.add_attention(block);
  gemm::multiply_few(with_rows<T>(layer.expanding, tokens.normalised(), hidden), images);
  gemm::multiply_few(with_rows<T>(layer.contracting, hidden, out, tokens.total()), images);
}

#define CEIT_INSTANTIATE(T)                                                                           \
  template class Norm<T>;                                                                             \
  template void infer_encoder(const Encoder<T>&, int64_t, int64_t, const T*, T*);                     \
  template void infer_class_token(const Attention<T>&, int64_t, int64_t, int64_t, const T*, Rows<T>); \
  template void infer_layers(const Layers<T>&, int64_t, int64_t, const T*, T*);
CEIT_INSTANTIATE(float)
CEIT_INSTANTIATE(Bf16)
CEIT_INSTANTIATE(double)

}  // namespace ceit::block
