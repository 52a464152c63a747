// Patch tokens from the stem's map, with the class token ahead of them and positions added.
#include <algorithm>

#include "../capability.h"
#include "../scalar.h"
#include "block.h"

namespace ceit::block {
namespace {

// oneDNN's brgemm adds up all depth in one chain, which would lose digits of float32: there a sum for each row of a
// patch.
template <class T>
bool by_rows() {
  return std::is_same_v<T, float> && capability() >= Capability::avx512;
}

// Columns of a patch's elements in the order of the map's, for elements `first` of `count` rows of a patch.
template <class T>
std::vector<T> in_order_of_map(const T* weight, const PatchSizes& sizes, int64_t first, int64_t count) {
  const int64_t pixels = sizes.height * sizes.width, line = sizes.line(), depth = count * line;
  std::vector<T> ordered(size_t(sizes.channels * depth));
  torch::stable::parallel_for(0, sizes.channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t out = begin; out < end; ++out) {
      T* to = ordered.data() + out * depth;
      const T* from = weight + out * sizes.map_channels * pixels + first * sizes.width;
      for (int64_t c = 0; c < sizes.map_channels; ++c)
        for (int64_t pixel = 0; pixel < count * sizes.width; ++pixel)
          to[pixel * sizes.map_channels + c] = from[c * pixels + pixel];
    }
  });
  return ordered;
}

}  // namespace

template <class T>
Patches<T>::Patches(const PatchSizes& sizes, gemm::Packer<T>& packer) : PatchSizes(sizes) {
  const int64_t parts = by_rows<T>() ? height : 1, count = height / parts;
  const T* weight = packer.fills() ? packer.whole("projection", channels * height * line()) : nullptr;
  for (int64_t part = 0; part < parts; ++part) {
    std::vector<T> ordered;
    if (weight) ordered = in_order_of_map(weight, sizes, part * count, count);
    projections.push_back(packer.packed(ordered.data(), channels, count * line()));
    projections.back().a_stride = height * line();
    projections.back().accumulate = part > 0;
  }
  projections.back().shift = packer.vector("bias", channels);
  class_token = packer.copy("class_token", channels);
  positions = packer.copy("positions", (1 + tokens()) * channels);
  projections.back().residual = positions + channels;
}

template <class T>
void infer_patches(const Patches<T>& patches, int64_t images, const T* map, T* out) {
  const int64_t columns = patches.columns(), line = patches.line(), channels = patches.channels;
  const int64_t depth = patches.height * line, tokens = patches.tokens(),
                row_of_map = patches.map_width * patches.map_channels;
  gemm::for_images(images, tokens * depth * int64_t(sizeof(T)), [&](int64_t image, gemm::Place place, auto run) {
    T* all = static_cast<T*>(place.memory);
    const T* from = map + image * patches.map_height * row_of_map;
    T* to = out + image * (1 + tokens) * channels;
    for (int64_t c = 0; c < channels; ++c) to[c] = sum_of(patches.class_token[c], patches.positions[c]);
    run(patches.rows(), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t y = 0; y < patches.height; ++y) {
          const T* pixels = from + (row * patches.height + y) * row_of_map;
          T* patch = all + row * columns * depth + y * line;
          for (int64_t column = 0; column < columns; ++column, pixels += line, patch += depth)
            std::copy(pixels, pixels + line, patch);
        }
      int64_t first = 0;
      for (gemm::Call<T> call : patches.projections) {
        call.a = all + first, call.out = to + channels;
        gemm::multiply(call, begin * columns, end * columns);
        first += call.depth;
      }
    });
  });
}

#define CEIT_INSTANTIATE(T)   \
  template struct Patches<T>; \
  template void infer_patches(const Patches<T>&, int64_t, const T*, T*);
CEIT_INSTANTIATE(float)
CEIT_INSTANTIATE(Bf16)
CEIT_INSTANTIATE(double)

}  // namespace ceit::block
