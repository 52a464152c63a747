// Patch tokens from the stem's map, with the class token ahead of them and positions added.
#include <algorithm>

#include "../sums.h"
#include "block.h"

namespace ceit::block {
namespace {

// A sum for each row of a patch: one long chain of additions would lose digits of float32.
void project(const panels::Call<float>& call, int64_t patch_height, int64_t begin, int64_t end) {
  const int64_t line = call.terms / patch_height;
  for (int64_t y = 0; y < patch_height; ++y) {
    panels::Call<float> part = call;
    part.terms = line, part.add = y > 0;
    part.a = call.a + y * line, part.b = call.b + y * line * panels::kColumns;
    if (y + 1 < patch_height) part.bias = part.residual = nullptr;
    panels::multiply(part, begin, end);
  }
}
void project(const panels::Call<Bf16>& call, int64_t, int64_t begin, int64_t end) { panels::multiply(call, begin, end); }

}  // namespace

template <class T>
void infer_patches(const Patches& patches, panels::Call<T> projection, int64_t images, const T* map,
                   const T* class_token, const T* positions, T* out) {
  const int64_t rows = patches.map_height / patches.height, columns = patches.map_width / patches.width;
  const int64_t line = patches.width * patches.channels, channels = projection.columns;
  const int64_t tokens = rows * columns;
  projection.a_stride = projection.terms, projection.out_stride = channels;
  projection.residual = positions + channels;
  const int64_t floats = panels::floats_for<T>(tokens * projection.terms);
  panels::for_images(images, floats, [&](int64_t image, panels::Place place, auto run) {
    T* all = reinterpret_cast<T*>(place.memory);
    const T* from = map + image * patches.map_height * patches.map_width * patches.channels;
    T* to = out + image * (1 + tokens) * channels;
    for (int64_t c = 0; c < channels; ++c) to[c] = sum_of(class_token[c], positions[c]);
    run(rows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t y = 0; y < patches.height; ++y) {
          const T* pixels = from + (row * patches.height + y) * patches.map_width * patches.channels;
          T* patch = all + row * columns * projection.terms + y * line;
          for (int64_t column = 0; column < columns; ++column, pixels += line, patch += projection.terms)
            std::copy(pixels, pixels + line, patch);
        }
      panels::Call<T> call = projection;
      call.a = all, call.out = to + channels;
      project(call, patches.height, begin * columns, end * columns);
    });
  });
}

template void infer_patches(const Patches&, panels::Call<float>, int64_t, const float*, const float*, const float*,
                            float*);
template void infer_patches(const Patches&, panels::Call<Bf16>, int64_t, const Bf16*, const Bf16*, const Bf16*, Bf16*);

}  // namespace ceit::block
