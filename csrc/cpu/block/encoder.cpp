// Encoder blocks. All tokens: four steps an image, each on rows that stay with their thread. The class token alone:
// keys and values of all tokens, and of the rest one row an image.
#include <vector>

#include "../scalar.h"
#include "parts.h"

namespace ceit::block {
namespace {

// An image's memory.
template <class T, class Tokens>
struct Memory {
  Tokens *total, *prefix;
  T *normalised, *qkv, *attended, *leff;
  Memory(gemm::Arena& arena, int64_t rows, const leff::Inference<T>& of)
      : total(arena.take<Tokens>(rows * of.channels)),
        prefix(arena.take<Tokens>(of.prefix * of.channels)),
        normalised(arena.take<T>(rows * of.channels)),
        qkv(arena.take<T>(3 * rows * of.channels)),
        attended(arena.take<T>(rows * of.channels)),
        leff(arena.take<T>(of.memory())) {}
};

// One row an image: the token that asks, what attention gives it, their sum and its norm.
template <class T, class Tokens>
class ClassTokens {
 public:
  ClassTokens(int64_t images, int64_t channels)
      : images_(images),
        channels_(channels),
        tokens_(size_t(3 * images * channels)),
        attended_(size_t(images * channels)) {}
  void ask(int64_t image, const Tokens* token) { std::copy(token, token + channels_, row(0, image)); }
  T* attended(int64_t image) { return attended_.data() + image * channels_; }
  Tokens* total() { return row(1, 0); }
  Tokens* normalised() { return row(2, 0); }
  void add_attention(const Attention<T, Tokens>& block) {
    gemm::multiply_few(gemm::call_of<T, Tokens>(block.projection, attended(0), total(), row(0, 0)), images_);
    block.norm2(total(), normalised(), 0, images_);
  }

 private:
  Tokens* row(int64_t part, int64_t image) { return tokens_.data() + (part * images_ + image) * channels_; }
  int64_t images_, channels_;
  std::vector<Tokens> tokens_;
  std::vector<T> attended_;
};

}  // namespace

template <class T, class Tokens>
void infer_encoder(const Encoder<T, Tokens>& encoder, int64_t images, int64_t rows, const Tokens* x, Tokens* out) {
  const Attention<T, Tokens>& block = encoder.attention;
  const leff::Inference<T>& leff = encoder.leff;
  const int64_t channels = leff.channels, elements = rows * channels;
  gemm::Arena counting;
  Memory<T, Tokens>(counting, rows, leff);
  gemm::for_images(images, counting.bytes(), [&](int64_t image, gemm::Place place, auto run) {
    gemm::Arena arena(place.memory);
    const Memory<T, Tokens> memory(arena, rows, leff);
    const Tokens* in = x + image * elements;
    run(rows, [&](int64_t begin, int64_t end) {
      block.norm1(in, memory.normalised, begin, end);
      gemm::multiply(gemm::call_of<T, T>(block.qkv, memory.normalised, memory.qkv), begin, end);
    });
    attend(block, 1, rows, rows, channels, memory.qkv, memory.attended, run);
    run(rows, [&](int64_t begin, int64_t end) {
      gemm::multiply(gemm::call_of<T, Tokens>(block.projection, memory.attended, memory.total, in), begin, end);
      block.norm2(memory.total, memory.normalised, begin, end);
      // These pass LeFF as they are.
      block.norm2(memory.total, memory.prefix, std::min(begin, leff.prefix), std::min(end, leff.prefix));
      leff.expand(memory.normalised, memory.leff, std::max<int64_t>(0, begin - leff.prefix), end - leff.prefix);
    });
    run(leff.height, [&](int64_t begin, int64_t end) {
      leff.contract(memory.prefix, memory.total, memory.leff, out + image * elements, begin, end);
    });
  });
}

template <class T, class Tokens>
void infer_class_token(const Attention<T, Tokens>& block, int64_t images, int64_t rows, int64_t channels,
                       const Tokens* x, Rows<Tokens> out) {
  const int64_t elements = rows * channels;
  ClassTokens<T, Tokens> tokens(images, channels);
  gemm::for_images(images, 4 * elements * int64_t(sizeof(T)), [&](int64_t image, gemm::Place place, auto run) {
    T* memory = static_cast<T*>(place.memory);
    const Tokens* in = x + image * elements;
    tokens.ask(image, in);
    const auto qkv = gemm::call_of<T, T>(block.qkv, memory, memory + elements);
    // Panels with a column of keys or values of all rows, and those of queries, which may share one, of the first.
    const gemm::Range keys_and_values{channels / gemm::kPanelColumns, gemm::panels_of(3 * channels)};
    run(rows, [&](int64_t begin, int64_t end) {
      block.norm1(in, memory, begin, end);
      gemm::multiply(qkv, gemm::Range{begin, end}, keys_and_values);
      if (begin == 0) gemm::multiply(qkv, gemm::Range{0, 1}, gemm::Range{0, gemm::panels_of(channels)});
    });
    attend(block, 1, rows, 1, channels, qkv.out, tokens.attended(image), run);
  });
  tokens.add_attention(block);
  for (int64_t i = 0; i < images * channels; ++i)
    out.of(i / channels)[i % channels] = sum_of(tokens.total()[i], tokens.normalised()[i]);
}

template <class T>
void infer_layers(const Layers<T>& layer, int64_t images, int64_t layers, const T* x, T* out) {
  const Attention<T>& block = layer.attention;
  const int64_t channels = layer.channels, rows = images * layers, elements = rows * channels;
  ClassTokens<T, T> tokens(images, channels);
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
  gemm::multiply_few(gemm::call_of<T, T>(block.qkv, memory, memory + elements), rows);
  attend(block, images, layers, 1, channels, memory + elements, tokens.attended(0), gemm::Threads());
  tokens.add_attention(block);
  gemm::multiply_few(gemm::call_of<T, T>(layer.expanding, tokens.normalised(), hidden), images);
  gemm::multiply_few(gemm::call_of<T, T>(layer.contracting, hidden, out, tokens.total()), images);
}

#define CEIT_INSTANTIATE(T, Tokens)                                                                 \
  template void infer_encoder(const Encoder<T, Tokens>&, int64_t, int64_t, const Tokens*, Tokens*); \
  template void infer_class_token(const Attention<T, Tokens>&, int64_t, int64_t, int64_t, const Tokens*, Rows<Tokens>);
#define CEIT_INSTANTIATE_ALIKE(T) \
  CEIT_INSTANTIATE(T, T)          \
  template void infer_layers(const Layers<T>&, int64_t, int64_t, const T*, T*);
CEIT_INSTANTIATE_ALIKE(float)
CEIT_INSTANTIATE_ALIKE(Bf16)
CEIT_INSTANTIATE_ALIKE(double)
CEIT_INSTANTIATE(Bf16, float)

}  // namespace ceit::block
