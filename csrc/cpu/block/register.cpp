// Inference of many layers in a call and its registration, through libtorch's stable ABI. The schemas are in
// ceit_kernels/block.
#include <algorithm>

#include "../i2t/i2t.h"
#include "block.h"

namespace ceit::block {

EncoderSizes::EncoderSizes(const Numbers& sizes) {
  STD_TORCH_CHECK(sizes.size() == 9, "sizes: expected 9 numbers, got ", sizes.size());
  channels = sizes[0], heads = sizes[1], tokens = sizes[6] * sizes[7], blocks = sizes[8];
  leff.channels = leff.outputs = channels, leff.hidden = sizes[2], leff.side = int(sizes[3]);
  leff.first = gemm::activation_of(sizes[4]), leff.second = gemm::activation_of(sizes[5]);
  leff.height = int(sizes[6]), leff.width = int(sizes[7]);
}

PatchSizes patch_sizes(const Tensor& image, int64_t map_channels, int64_t height, int64_t width, int64_t channels) {
  STD_TORCH_CHECK(image.dim() == 4 && image.numel() > 0, "image: expected (B, I, H, W)");
  STD_TORCH_CHECK(height > 0 && width > 0, "patch: expected a height and a width, got ", height, " and ", width);
  return {(image.size(2) + 3) / 4, (image.size(3) + 3) / 4, map_channels, height, width, channels};
}

Tensor stem_map(const Tensor& image, const Tensor& stem, const Tensor& sign, const Tensor& norm,
                const PatchSizes& sizes) {
  const auto map = new_empty(image, {image.size(0), sizes.map_height, sizes.map_width, sizes.map_channels});
  i2t_cpu::forward(image, stem, sign, norm, map, std::nullopt, std::nullopt);
  return map;
}

namespace {

// out (B, N, C) of tokens x, and their first tokens behind every block, class_tokens (B, blocks, C). parameters: of
// each block norm1, qkv, projection, norm2 (weight and bias each) and what leff::infer takes. Computes in T, whose
// weights may be Tokens.
template <class T, class Tokens>
void infer_blocks(const Tensor& x, const Parameters& parameters, const Scalars& scalars, const Numbers& sizes,
                  bool class_token_only, const Tensor& out, const Tensor& class_tokens) {
  const EncoderSizes size(sizes);
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) >= size.tokens && x.size(2) == size.channels && x.numel() > 0,
                  "x: expected tokens (B, at least ", size.tokens, ", ", size.channels, ")");
  STD_TORCH_CHECK(parameters.size() == kParameters * size_t(size.blocks), "parameters: expected ", kParameters,
                  " for each of ", size.blocks, " blocks, got ", parameters.size());
  const int64_t images = x.size(0), rows = x.size(1);
  const Tokens* from = elements<Tokens>("x", x, x.numel());
  Tokens* to = elements<Tokens>("out", out, x.numel());
  Tokens* first = elements<Tokens>("class_tokens", class_tokens, images * size.blocks * size.channels);
  const Tensor spare = new_empty(x, {size.blocks > 1 ? x.numel() : 0});
  const auto block = [&](int64_t index, const auto& use) {
    const auto start = parameters.begin() + int64_t(kParameters) * index;
    const Parameters own(start, start + kParameters);
    const auto make = [&](gemm::Packer<T>& packer) {
      return size.block<T, Tokens>(rows - size.tokens, scalars, index, packer);
    };
    gemm::with_prepacked<T>(own, std::nullopt, make, use);
  };
  run_blocks(images, rows, size.channels, size.blocks, class_token_only, from, static_cast<Tokens*>(spare.data_ptr()),
             to, first, block);
}

void infer_encoder_tensors(Tensor x, Parameters parameters, Scalars scalars, Numbers sizes, bool in_bfloat16,
                           bool class_token_only, Tensor out, Tensor class_tokens) {
  const auto infer = [&](auto type, auto tokens) {
    infer_blocks<decltype(type), decltype(tokens)>(x, parameters, scalars, sizes, class_token_only, out, class_tokens);
  };
  if (in_bfloat16 && x.scalar_type() == ScalarType::Float) return infer(Bf16(), float());
  with_dtype(x, [&](auto type) { infer(type, type); });
}

// out (B, 1, C) of class tokens x (B, L, C). parameters: norm1, qkv, projection, norm2, fc1, fc2, weight and bias each.
void infer_layers_tensors(Tensor x, Parameters parameters, Scalars scalars, Numbers sizes, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 3 && x.numel() > 0 && x.size(2) == sizes[0], "x: expected class tokens (B, L, C)");
  with_dtype(x, [&](auto type) {
    using T = decltype(type);
    const auto make = [&](gemm::Packer<T>& packer) { return layers_of(scalars, 0, sizes, packer); };
    gemm::with_prepacked<T>(parameters, std::nullopt, make, [&](const Layers<T>& block) {
      infer_layers(block, x.size(0), x.size(1), elements<T>("x", x, x.numel()),
                   elements<T>("out", out, x.size(0) * block.channels));
    });
  });
}

// out (B, 1 + tokens, C) of images: the stem's map, its patches projected, the class token ahead, positions added.
// parameters: weight and bias of the projection, class token, positions.
void infer_embedding(Tensor image, Tensor stem, Tensor sign, Tensor norm, Parameters parameters, int64_t height,
                     int64_t width, Tensor out) {
  STD_TORCH_CHECK(out.dim() == 3, "out: expected (B, 1 + tokens, C)");
  const PatchSizes sizes = patch_sizes(image, sign.numel(), height, width, out.size(2));
  const Tensor map = stem_map(image, stem, sign, norm, sizes);
  with_dtype(image, [&](auto type) {
    using T = decltype(type);
    const auto make = [&](gemm::Packer<T>& packer) { return Patches<T>(sizes, packer); };
    gemm::with_prepacked<T>(parameters, std::nullopt, make, [&](const Patches<T>& patches) {
      infer_patches(patches, image.size(0), elements<T>("map", map, map.numel()),
                    elements<T>("out", out, image.size(0) * (1 + sizes.tokens()) * sizes.channels));
    });
  });
}

}  // namespace
}  // namespace ceit::block

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_embedding_infer", TORCH_BOX(&ceit::block::infer_embedding));
  m.impl("_encoder_infer", TORCH_BOX(&ceit::block::infer_encoder_tensors));
  m.impl("_layers_infer", TORCH_BOX(&ceit::block::infer_layers_tensors));
}
