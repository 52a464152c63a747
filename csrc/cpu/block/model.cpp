// A whole CeiT at inference, from images to logits, of what was prepacked for it once.
#include "../scalar.h"
#include "parts.h"

namespace ceit::block {
namespace {

// Numbers of each part, one after another.
struct ModelSizes {
  PatchSizes patches;
  EncoderSizes encoder;
  Numbers layers;
  int64_t classes;
};

// sizes: height and width of a patch, those of EncoderSizes, those of layers_of, and classes.
ModelSizes model_sizes(const Tensor& image, int64_t map_channels, const Numbers& sizes) {
  STD_TORCH_CHECK(sizes.size() == 16, "sizes: expected 16 numbers, got ", sizes.size());
  const auto at = sizes.begin();
  const Numbers encoder(at + 2, at + 11), layers(at + 11, at + 15);
  return {patch_sizes(image, map_channels, sizes[0], sizes[1], encoder[0]), EncoderSizes(encoder), layers, sizes[15]};
}

template <class T>
struct Model {
  Patches<T> patches;
  std::vector<Encoder<T>> blocks;
  const T* positions;  // of the class tokens (blocks, C)
  Layers<T> layers;
  Norm<T> norm;
  gemm::Call<T> head;
  Model(const ModelSizes& sizes, const Scalars& scalars, gemm::Packer<T>& packer)
      : patches(sizes.patches, packer),
        blocks(encoders(sizes.encoder, scalars, packer)),
        positions(packer.copy("layer_positions", sizes.encoder.blocks * sizes.encoder.channels)),
        layers(layers_of(scalars, blocks.size() * kScalars, sizes.layers, packer)),
        norm(sizes.encoder.channels, scalars.back(), packer),
        head(packer.linear(sizes.classes, sizes.encoder.channels)) {}

 private:
  static std::vector<Encoder<T>> encoders(const EncoderSizes& sizes, const Scalars& scalars, gemm::Packer<T>& packer) {
    std::vector<Encoder<T>> made;
    for (int64_t i = 0; i < sizes.blocks; ++i) made.push_back(sizes.block<T>(1, scalars, i, packer));
    return made;
  }
};

// Logits (images, classes) of the stem's map.
template <class T>
void infer_model(const Model<T>& model, int64_t images, const Tensor& map, const Tensor& out) {
  const int64_t channels = model.patches.channels, rows = 1 + model.patches.tokens();
  const int64_t blocks = int64_t(model.blocks.size()), count = images * rows * channels;
  const Tensor memory = new_empty(map, {3 * count + images * (blocks + 2) * channels});
  T* tokens = static_cast<T*>(memory.data_ptr());
  T *spare = tokens + count, *last = spare + count, *class_tokens = last + count;
  T *asked = class_tokens + images * blocks * channels, *normalised = asked + images * channels;
  infer_patches(model.patches, images, elements<T>("map", map, map.numel()), tokens);
  run_blocks(images, rows, channels, blocks, true, tokens, spare, last, class_tokens,
             [&](int64_t index, const auto& use) { use(model.blocks[size_t(index)]); });
  for (int64_t i = 0; i < images * blocks * channels; ++i)
    class_tokens[i] = sum_of(class_tokens[i], model.positions[i % (blocks * channels)]);
  infer_layers(model.layers, images, blocks, class_tokens, asked);
  model.norm(asked, normalised, 0, images);
  gemm::Call<T> head = model.head;
  head.a = normalised, head.out = elements<T>("out", out, images * head.columns);
  gemm::multiply_few(head, images);
}

// Parameters: those of the patches, of each block, the class tokens' positions, of the block over them, weight and bias
// of the last norm and of the head.
Tensor prepack_model(Tensor image, int64_t map_channels, Parameters parameters, Scalars scalars, Numbers numbers) {
  const ModelSizes sizes = model_sizes(image, map_channels, numbers);
  return with_dtype(image, [&](auto type) {
    using T = decltype(type);
    return gemm::prepack<T>(image, parameters,
                            [&](gemm::Packer<T>& packer) { return Model<T>(sizes, scalars, packer); });
  });
}

Tensor infer_model_tensors(Tensor image, Tensor stem, Tensor sign, Tensor norm, Tensor prepacked, Scalars scalars,
                           Numbers numbers) {
  const ModelSizes sizes = model_sizes(image, sign.numel(), numbers);
  const Tensor map = stem_map(image, stem, sign, norm, sizes.patches);
  const Tensor out = new_empty(image, {image.size(0), sizes.classes});
  with_dtype(image, [&](auto type) {
    using T = decltype(type);
    const auto make = [&](gemm::Packer<T>& packer) { return Model<T>(sizes, scalars, packer); };
    gemm::with_prepacked<T>({}, prepacked, make,
                            [&](const Model<T>& model) { infer_model(model, image.size(0), map, out); });
  });
  return out;
}

}  // namespace
}  // namespace ceit::block

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_model_prepack", TORCH_BOX(&ceit::block::prepack_model));
  m.impl("_model_infer", TORCH_BOX(&ceit::block::infer_model_tensors));
}
