// Transformer blocks of CeiT at inference, their weights prepacked.
#pragma once

#include <algorithm>

#include "../add_norm/calls.h"
#include "../attention/calls.h"
#include "../gemm/packing.h"
#include "../leff/inference.h"

namespace ceit::block {

// A LayerNorm of rows, of weight and bias.
template <class T>
class Norm {
 public:
  template <class Packer>
  Norm(int64_t channels, double eps, Packer& packer) {
    call_.channels = channels, call_.eps = eps;
    call_.weight = packer.vector("norm.weight", channels, 1);
    call_.bias = packer.vector("norm.bias", channels);
  }
  // out = the norm of rows `begin` to `end` of x, with the mean and reciprocal deviation of each where they are wanted.
  template <class Out>
  void operator()(const T* x, Out* out, int64_t begin, int64_t end, acc_t<T>* mean = nullptr,
                  acc_t<T>* rstd = nullptr) const;

 private:
  add_norm::ForwardCall call_{};
};

// Of an attention between two norms.
struct AttentionSizes {
  int64_t channels, heads;
  double eps1, scale, eps2;
};

// What all blocks begin with: norm, attention, norm. GEMMs of T are without their rows; tokens between blocks are
// Tokens, which under autocast are not rounded.
template <class T, class Tokens = T>
struct Attention {
  int64_t heads;
  double scale;
  Norm<Tokens> norm1;
  gemm::Product<T> qkv, projection;
  Norm<Tokens> norm2;
  Attention(const AttentionSizes& sizes, gemm::Packer<T>& packer)
      : heads(sizes.heads),
        scale(sizes.scale),
        norm1(sizes.channels, sizes.eps1, packer),
        qkv(packer.linear(3 * sizes.channels, sizes.channels)),
        projection(packer.linear(sizes.channels, sizes.channels)),
        norm2(sizes.channels, sizes.eps2, packer) {}
};

// An encoder block: attention, then LeFF.
template <class T, class Tokens = T>
struct Encoder {
  Attention<T, Tokens> attention;
  leff::Inference<T> leff;
  Encoder(const AttentionSizes& sizes, const leff::Sizes& of_leff, gemm::Packer<T>& packer)
      : attention(sizes, packer), leff(of_leff, packer) {}
};

// out (images, rows, C) from x of the same shape.
template <class T, class Tokens>
void infer_encoder(const Encoder<T, Tokens>& block, int64_t images, int64_t rows, const Tokens* x, Tokens* out);

// A row for each image.
template <class T>
struct Rows {
  T* start;
  int64_t stride;
  T* of(int64_t image) const { return start + image * stride; }
};

// The class token of an encoder block that passes it unchanged through LeFF.
template <class T, class Tokens>
void infer_class_token(const Attention<T, Tokens>& attention, int64_t images, int64_t rows, int64_t channels,
                       const Tokens* x, Rows<Tokens> out);

// The block over class tokens: attention, then two linear layers.
template <class T>
struct Layers {
  int64_t channels;
  Attention<T> attention;
  gemm::Call<T> expanding, contracting;
  Layers(const AttentionSizes& sizes, int64_t hidden, Activation activation, gemm::Packer<T>& packer)
      : channels(sizes.channels),
        attention(sizes, packer),
        expanding(packer.linear(hidden, sizes.channels)),
        contracting(packer.linear(sizes.channels, hidden)) {
    expanding.activation = activation;
  }
};

// out (images, C), the last of x (images, layers, C) asking.
template <class T>
void infer_layers(const Layers<T>& block, int64_t images, int64_t layers, const T* x, T* out);

// A map (map_height, map_width, map_channels) of an image, its patches, and the channels that they are projected to.
struct PatchSizes {
  int64_t map_height, map_width, map_channels, height, width, channels;
  int64_t rows() const { return map_height / height; }
  int64_t columns() const { return map_width / width; }
  int64_t tokens() const { return rows() * columns(); }
  int64_t line() const { return width * map_channels; }
};

// The projection of patches, weight (C, map_channels, height, width) and bias, a class token (C) and positions
// (1 + tokens, C).
template <class T>
struct Patches : PatchSizes {
  std::vector<gemm::Call<T>> projections;  // of the rows of a patch, or of the whole patch
  const T *class_token, *positions;
  Patches(const PatchSizes& sizes, gemm::Packer<T>& packer);
};

// out (images, 1 + tokens, C): the class token, then the projected patches of a map, and positions added.
template <class T>
void infer_patches(const Patches<T>& patches, int64_t images, const T* map, T* out);

// Runs blocks one after another, which block(index, use) gives; tokens go from x to out by way of `spare`. Leaves the
// first token behind every block in class_tokens (images, blocks, C). The last computes that one alone if it may.
template <class Tokens, class Block>
void run_blocks(int64_t images, int64_t rows, int64_t channels, int64_t blocks, bool class_token_only, const Tokens* x,
                Tokens* spare, Tokens* out, Tokens* class_tokens, const Block& block) {
  for (int64_t i = 0; i < blocks; ++i) {
    const Rows<Tokens> first{class_tokens + i * channels, blocks * channels};
    Tokens* to = (blocks - 1 - i) % 2 == 0 ? out : spare;
    block(i, [&](const auto& encoder) {
      if (class_token_only && i == blocks - 1)
        return infer_class_token(encoder.attention, images, rows, channels, x, first);
      infer_encoder(encoder, images, rows, x, to);
      for (int64_t image = 0; image < images; ++image)
        std::copy_n(to + image * rows * channels, channels, first.of(image));
    });
    x = to;
  }
}

// What the compiled calls take as lists of numbers.
using Numbers = std::vector<int64_t>;
using Scalars = std::vector<double>;
using Parameters = std::vector<OptionalTensor>;

inline AttentionSizes attention_sizes(int64_t channels, int64_t heads, const Scalars& scalars, size_t at) {
  STD_TORCH_CHECK(scalars.size() >= at + 3, "scalars: expected more than ", scalars.size());
  return {channels, heads, scalars[at], scalars[at + 1], scalars[at + 2]};
}

// Parameters of an encoder block, and the scalars that belong to it: eps1, scale, eps2 of its attention, three eps of
// LeFF.
constexpr size_t kParameters = 26, kScalars = 6;

// sizes: C, heads, E, side of the kernel, both activations, height, width, blocks.
struct EncoderSizes {
  int64_t channels, heads, tokens, blocks;
  leff::Sizes leff{};
  explicit EncoderSizes(const Numbers& sizes);
  template <class T, class Tokens = T>
  Encoder<T, Tokens> block(int64_t prefix, const Scalars& scalars, int64_t index, gemm::Packer<T>& packer) const {
    const size_t at = size_t(index) * kScalars;
    STD_TORCH_CHECK(scalars.size() >= at + kScalars, "scalars: expected ", kScalars, " for each of ", blocks,
                    " blocks");
    leff::Sizes of_leff = leff;
    of_leff.prefix = prefix;
    std::copy_n(scalars.data() + at + 3, 3, of_leff.eps);
    return {attention_sizes(channels, heads, scalars, at), of_leff, packer};
  }
};

// sizes: C, heads, hidden, activation.
template <class T>
Layers<T> layers_of(const Scalars& scalars, size_t at, const Numbers& sizes, gemm::Packer<T>& packer) {
  STD_TORCH_CHECK(sizes.size() == 4, "sizes: expected 4 numbers, got ", sizes.size());
  return {attention_sizes(sizes[0], sizes[1], scalars, at), sizes[2], gemm::activation_of(sizes[3]), packer};
}

PatchSizes patch_sizes(const Tensor& image, int64_t map_channels, int64_t height, int64_t width, int64_t channels);
// The stem's map (B, map_height, map_width, map_channels) of images.
Tensor stem_map(const Tensor& image, const Tensor& stem, const Tensor& sign, const Tensor& norm,
                const PatchSizes& sizes);

}  // namespace ceit::block
