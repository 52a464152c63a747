// Blocks' inference on the CPU and its registration, through libtorch's stable ABI. The schemas are in
// ceit_kernels/block/native_cpu.py.
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

// out (B, N, C) of tokens x, some images at a time, so that what is between the products stays in cache.
void infer(Tensor x, OptionalTensor norm_weight1, OptionalTensor norm_bias1, double eps1, Tensor qkv_weight,
           OptionalTensor qkv_bias, int64_t heads, double scale, Tensor projection_weight,
           OptionalTensor projection_bias, OptionalTensor norm_weight2, OptionalTensor norm_bias2, double eps2,
           Tensor weight1, Tensor bias1, Tensor taps, Tensor bias2, Tensor weight3, Tensor bias3, int64_t first,
           int64_t second, int64_t height, int64_t width, int64_t images, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous() && x.numel() > 0, "x: expected contiguous tokens (B, N, C)");
  STD_TORCH_CHECK(images > 0, "images: expected a positive number, got ", images);
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2), most = std::min(images, batch);
  if (panels::is_packed(qkv_weight)) {
    const leff::Bands bands(channels, tokens - height * width, height, width, channels, weight1, bias1, taps, bias2,
                            weight3, bias3, first, second);
    infer_encoder({{norm_weight1, norm_bias1, eps1, channels}, {norm_weight2, norm_bias2, eps2, channels}, heads, scale,
                   panels::call(qkv_weight, qkv_bias, channels, 3 * channels),
                   panels::call(projection_weight, projection_bias, channels, channels)},
                  bands, batch, tokens, floats("x", x, x.numel()), floats("out", out, x.numel()));
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
}

// out (B, 1, C) of tokens x (B, N, C): the class token of an encoder block.
void infer_class_token_tensors(Tensor x, OptionalTensor norm_weight1, OptionalTensor norm_bias1, double eps1, Tensor qkv_weight,
                       OptionalTensor qkv_bias, int64_t heads, double scale, Tensor projection_weight,
                       OptionalTensor projection_bias, OptionalTensor norm_weight2, OptionalTensor norm_bias2,
                       double eps2, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 3 && x.numel() > 0, "x: expected tokens (B, N, C)");
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  infer_class_token({{norm_weight1, norm_bias1, eps1, channels}, {norm_weight2, norm_bias2, eps2, channels}, heads, scale,
                     panels::call(qkv_weight, qkv_bias, channels, 3 * channels),
                     panels::call(projection_weight, projection_bias, channels, channels)},
                    batch, tokens, channels, floats("x", x, x.numel()), floats("out", out, batch * channels));
}

// out (B, 1, C) of class tokens x (B, L, C).
void infer_layers_tensors(Tensor x, OptionalTensor norm_weight1, OptionalTensor norm_bias1, double eps1, Tensor qkv_weight,
                  OptionalTensor qkv_bias, int64_t heads, double scale, Tensor projection_weight,
                  OptionalTensor projection_bias, OptionalTensor norm_weight2, OptionalTensor norm_bias2, double eps2,
                  Tensor weight1, OptionalTensor bias1, Tensor weight2, OptionalTensor bias2, int64_t activation,
                  int64_t hidden, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 3 && x.numel() > 0, "x: expected class tokens (B, L, C)");
  const int64_t batch = x.size(0), layers = x.size(1), channels = x.size(2);
  panels::Call expanding = panels::call(weight1, bias1, channels, hidden);
  expanding.activation = leff::checked_activation(activation);
  infer_layers({{norm_weight1, norm_bias1, eps1, channels}, {norm_weight2, norm_bias2, eps2, channels}, heads, scale,
                panels::call(qkv_weight, qkv_bias, channels, 3 * channels),
                panels::call(projection_weight, projection_bias, channels, channels)},
               expanding, panels::call(weight2, bias2, hidden, channels), batch, layers, channels,
               floats("x", x, x.numel()), floats("out", out, batch * channels));
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
  infer_patches(patches, panels::call(projection, bias, patch_height * patch_width * channels, width), batch,
                floats("map", map, map.numel()), floats("class_token", class_token, width),
                floats("positions", positions, (1 + tokens) * width), floats("out", out, batch * (1 + tokens) * width));
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
