// Patch tokens from the stem's map, with the class token ahead of them and positions added.
#include <algorithm>

#include "block.h"

namespace ceit::block {

void infer_patches(const Patches& patches, panels::Call projection, int64_t images, const float* map,
                   const float* class_token, const float* positions, float* out) {
  const int64_t rows = patches.map_height / patches.height, columns = patches.map_width / patches.width;
  const int64_t line = patches.width * patches.channels, channels = projection.columns;
  const int64_t tokens = rows * columns;
  projection.a_stride = projection.terms, projection.out_stride = channels;
  projection.residual = positions + channels;
  panels::for_images(images, tokens * projection.terms, [&](int64_t image, panels::Place place, auto run) {
    const float* from = map + image * patches.map_height * patches.map_width * patches.channels;
    float* to = out + image * (1 + tokens) * channels;
    for (int64_t c = 0; c < channels; ++c) to[c] = class_token[c] + positions[c];
    run(rows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t y = 0; y < patches.height; ++y) {
          const float* pixels = from + (row * patches.height + y) * patches.map_width * patches.channels;
          float* patch = place.memory + row * columns * projection.terms + y * line;
          for (int64_t column = 0; column < columns; ++column, pixels += line, patch += projection.terms)
            std::copy(pixels, pixels + line, patch);
        }
      // A sum for each row of a patch: one long chain would lose digits.
      for (int64_t y = 0; y < patches.height; ++y) {
        panels::Call call = projection;
        call.terms = line, call.add = y > 0;
        call.a = place.memory + y * line, call.b = projection.b + y * line * panels::kColumns;
        call.out = to + channels;
        if (y + 1 < patches.height) call.bias = call.residual = nullptr;
        panels::multiply(call, begin * columns, end * columns);
      }
    });
  });
}

}  // namespace ceit::block
