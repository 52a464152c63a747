// Blocks' inference on the CPU and its registration, through libtorch's stable ABI. The schemas are in
// ceit_kernels/block.
#include <algorithm>

#include "../add_norm/add_norm.h"
#include "../attention/attention.h"
#include "../i2t/i2t.h"
#include "../leff/stages.h"
#include "../products.h"
#include "block.h"

namespace ceit::block {
namespace {

using torch::stable::narrow;
using torch::stable::new_empty;
using torch::stable::Tensor;
using torch::stable::view;
using OptionalTensor = std::optional<Tensor>;

// Calls body with a value of the type that a tensor has: Bf16, or else float, which is checked where elements are read.
template <class Body>
void with_type(const Tensor& like, Body body) {
  if (like.scalar_type() == torch::headeronly::ScalarType::BFloat16)
    body(Bf16{});
  else
    body(float{});
}

template <class T>
Rows<T> rows_of(const Tensor& class_tokens, int64_t layer, int64_t batch, int64_t channels) {
  STD_TORCH_CHECK(class_tokens.dim() == 3 && layer >= 0 && layer < class_tokens.size(1),
                  "class_tokens: expected (B, layers, C) with a layer ", layer);
  const int64_t stride = class_tokens.size(1) * channels;
  return {panels::elements<T>("class_tokens", class_tokens, batch * stride) + layer * channels, stride};
}

// The arguments that all blocks have.
struct AttentionTensors {
  const OptionalTensor &norm_weight1, &norm_bias1;
  double eps1;
  const Tensor& qkv_weight;
  const OptionalTensor& qkv_bias;
  int64_t heads;
  double scale;
  const Tensor& projection_weight;
  const OptionalTensor &projection_bias, &norm_weight2, &norm_bias2;
  double eps2;

  template <class T>
  Attention<T> of(int64_t channels) const {
    return {{norm_weight1, norm_bias1, eps1, channels},
            {norm_weight2, norm_bias2, eps2, channels},
            heads,
            scale,
            panels::call<T>(qkv_weight, qkv_bias, channels, 3 * channels),
            panels::call<T>(projection_weight, projection_bias, channels, channels)};
  }
};

// out (B, N, C) of tokens x, some images at a time, so that what is between the products stays in cache; and its first
// tokens, which are those of a layer in class_tokens (B, layers, C).
void infer(Tensor x, OptionalTensor norm_weight1, OptionalTensor norm_bias1, double eps1, Tensor qkv_weight,
           OptionalTensor qkv_bias, int64_t heads, double scale, Tensor projection_weight,
           OptionalTensor projection_bias, OptionalTensor norm_weight2, OptionalTensor norm_bias2, double eps2,
           Tensor weight1, Tensor bias1, Tensor taps, Tensor bias2, Tensor weight3, Tensor bias3, int64_t first,
           int64_t second, int64_t height, int64_t width, int64_t images, Tensor out, Tensor class_tokens,
           int64_t layer) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous() && x.numel() > 0, "x: expected contiguous tokens (B, N, C)");
  STD_TORCH_CHECK(images > 0, "images: expected a positive number, got ", images);
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2), most = std::min(images, batch);
  if (panels::is_packed(qkv_weight)) {
    const AttentionTensors attention{norm_weight1, norm_bias1,        eps1,            qkv_weight,   qkv_bias,   heads,
                                     scale,        projection_weight, projection_bias, norm_weight2, norm_bias2, eps2};
    with_type(x, [&](auto type) {
      using T = decltype(type);
      const leff::Bands<T> bands(channels, tokens - height * width, height, width, channels, weight1, bias1, taps, bias2,
                                 weight3, bias3, first, second);
      T* to = panels::elements<T>("out", out, x.numel());
      infer_encoder(attention.of<T>(channels), bands, batch, tokens, panels::elements<T>("x", x, x.numel()), to);
      const Rows<T> first_tokens = rows_of<T>(class_tokens, layer, batch, channels);
      for (int64_t i = 0; i < batch; ++i) std::copy_n(to + i * tokens * channels, channels, first_tokens.of(i));
    });
    return;
  }
  Tensor normalised = new_empty(x, {most, tokens, channels});
  Tensor attended = new_empty(x, {most, tokens, channels});
  Tensor total = new_empty(x, {most, tokens, channels});
  for (int64_t start = 0; start < batch; start += images) {
    const int64_t count = std::min(images, batch - start), rows = count * tokens;
    const Tensor part = narrow(x, 0, start, count), y = narrow(normalised, 0, 0, count);
    const Tensor attention = narrow(attended, 0, 0, count), sum = narrow(total, 0, 0, count);
    add_norm::forward(part, std::nullopt, norm_weight1, norm_bias1, eps1, std::nullopt, y, std::nullopt, std::nullopt);
    const Tensor qkv = linear(view(y, {rows, channels}), qkv_weight, qkv_bias);
    attention::forward(view(qkv, {count, tokens, 3 * channels}), heads, scale, attention, std::nullopt);
    const Tensor branch = linear(view(attention, {rows, channels}), projection_weight, projection_bias);
    add_norm::forward(part, view(branch, {count, tokens, channels}), norm_weight2, norm_bias2, eps2, sum, y,
                      std::nullopt, std::nullopt);
    leff::infer(y, y, weight1, bias1, taps, bias2, weight3, bias3, sum, first, second, height, width, count,
                narrow(out, 0, start, count));
  }
  Tensor first_tokens = narrow(class_tokens, 1, layer, 1);
  torch::stable::copy_(first_tokens, narrow(out, 1, 0, 1));
}

// The class token of an encoder block of tokens x (B, N, C), in the place of a layer's in class_tokens (B, layers, C).
void infer_class_token_tensors(Tensor x, OptionalTensor norm_weight1, OptionalTensor norm_bias1, double eps1,
                               Tensor qkv_weight, OptionalTensor qkv_bias, int64_t heads, double scale,
                               Tensor projection_weight, OptionalTensor projection_bias, OptionalTensor norm_weight2,
                               OptionalTensor norm_bias2, double eps2, Tensor class_tokens, int64_t layer) {
  STD_TORCH_CHECK(x.dim() == 3 && x.numel() > 0, "x: expected tokens (B, N, C)");
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  const AttentionTensors attention{norm_weight1, norm_bias1,        eps1,            qkv_weight,   qkv_bias,   heads,
                                   scale,        projection_weight, projection_bias, norm_weight2, norm_bias2, eps2};
  with_type(x, [&](auto type) {
    using T = decltype(type);
    infer_class_token(attention.of<T>(channels), batch, tokens, channels, panels::elements<T>("x", x, x.numel()),
                      rows_of<T>(class_tokens, layer, batch, channels));
  });
}

// out (B, 1, C) of class tokens x (B, L, C).
void infer_layers_tensors(Tensor x, OptionalTensor norm_weight1, OptionalTensor norm_bias1, double eps1,
                          Tensor qkv_weight, OptionalTensor qkv_bias, int64_t heads, double scale,
                          Tensor projection_weight, OptionalTensor projection_bias, OptionalTensor norm_weight2,
                          OptionalTensor norm_bias2, double eps2, Tensor weight1, OptionalTensor bias1, Tensor weight2,
                          OptionalTensor bias2, int64_t activation, int64_t hidden, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 3 && x.numel() > 0, "x: expected class tokens (B, L, C)");
  const int64_t batch = x.size(0), layers = x.size(1), channels = x.size(2);
  const AttentionTensors attention{norm_weight1, norm_bias1,        eps1,            qkv_weight,   qkv_bias,   heads,
                                   scale,        projection_weight, projection_bias, norm_weight2, norm_bias2, eps2};
  with_type(x, [&](auto type) {
    using T = decltype(type);
    auto expanding = panels::call<T>(weight1, bias1, channels, hidden);
    expanding.activation = leff::checked_activation(activation);
    infer_layers(attention.of<T>(channels), expanding, panels::call<T>(weight2, bias2, hidden, channels), batch, layers,
                 channels, panels::elements<T>("x", x, x.numel()), panels::elements<T>("out", out, batch * channels));
  });
}

// out (B, 1 + H * W, C) of images: the stem's map, its patches projected, the class token ahead, positions added.
void infer_embedding(Tensor image, Tensor stem, Tensor sign, Tensor norm, Tensor projection, OptionalTensor bias,
                     int64_t patch_height, int64_t patch_width, Tensor class_token, Tensor positions, Tensor out) {
  STD_TORCH_CHECK(image.dim() == 4 && out.dim() == 3, "image, out: expected (B, I, H, W) and (B, 1 + tokens, C)");
  STD_TORCH_CHECK(patch_height > 0 && patch_width > 0, "patch: expected a height and a width");
  const int64_t batch = image.size(0), channels = sign.numel(), width = out.size(2);
  const Patches patches{(image.size(2) + 3) / 4, (image.size(3) + 3) / 4, channels, patch_height, patch_width};
  const int64_t tokens = (patches.map_height / patch_height) * (patches.map_width / patch_width);
  const Tensor map = new_empty(image, {batch, patches.map_height, patches.map_width, channels});
  i2t_cpu::forward(image, stem, sign, norm, map, std::nullopt, std::nullopt);
  with_type(image, [&](auto type) {
    using T = decltype(type);
    infer_patches(patches, panels::call<T>(projection, bias, patch_height * patch_width * channels, width), batch,
                  panels::elements<T>("map", map, map.numel()), panels::elements<T>("class_token", class_token, width),
                  panels::elements<T>("positions", positions, (1 + tokens) * width),
                  panels::elements<T>("out", out, batch * (1 + tokens) * width));
  });
}

}  // namespace
}  // namespace ceit::block

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_block_infer", TORCH_BOX(&ceit::block::infer));
  m.impl("_embedding_infer", TORCH_BOX(&ceit::block::infer_embedding));
  m.impl("_block_infer_class_token", TORCH_BOX(&ceit::block::infer_class_token_tensors));
  m.impl("_block_infer_layers", TORCH_BOX(&ceit::block::infer_layers_tensors));
}

// Packed weights have a layout of oneDNN's.
STABLE_TORCH_LIBRARY_IMPL(ceit, MkldnnCPU, m) { m.impl("_block_infer", TORCH_BOX(&ceit::block::infer)); }
