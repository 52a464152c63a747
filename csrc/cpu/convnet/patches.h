// Rows of a map as a convolution meets them, and their patches for the GEMM.
#pragma once

#include <cstring>

#include "unit.h"

namespace ceit::convnet {

// Rows of a map, of which the last `count` are kept; all of them where the map is in memory.
template <class T>
struct Rows {
  T* data;
  Map map;
  int64_t count;
  T* of(int64_t y) const { return data + y % count * map.width * map.channels; }
  const T* inside(int64_t y) const { return y < 0 || y >= map.height ? nullptr : of(y); }
};

// Copies elements by 16 bytes at a time, the last of which may overlap: most are few.
template <class T>
void copy_elements(const T* from, int64_t count, T* to) {
  constexpr int64_t step = 16 / int64_t(sizeof(T));
  if (count < step) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + step <= count; i += step) std::memcpy(to + i, from + i, 16);
  std::memcpy(to + count - step, from + count - step, 16);
}

// The patches (pixels, side * side * channels) of pixels `begin` to `end` of a row of the result.
template <class T>
void copy_patches(const Layer<T>& layer, const Rows<const T>& from, int64_t y, int64_t begin, int64_t end, T* to) {
  const int64_t width = from.map.width, channels = layer.in, line = layer.side * channels;
  for (int dy = 0; dy < layer.side; ++dy, to += line) {
    const T* row = from.inside(y * layer.stride - layer.padding + dy);
    T* at = to;
    for (int64_t x = begin; x < end; ++x, at += layer.depth()) {
      const int64_t first = x * layer.stride - layer.padding;
      if (row && first >= 0 && first + layer.side <= width) {
        copy_elements(row + first * channels, line, at);
        continue;
      }
      const int64_t left = row ? std::min<int64_t>(layer.side, std::max<int64_t>(0, -first)) : layer.side;
      const int64_t right = std::max(left, std::min<int64_t>(layer.side, width - first));
      std::fill(at, at + left * channels, T{});
      if (left < right) copy_elements(row + (first + left) * channels, (right - left) * channels, at + left * channels);
      std::fill(at + right * channels, at + line, T{});
    }
  }
}

}  // namespace ceit::convnet
