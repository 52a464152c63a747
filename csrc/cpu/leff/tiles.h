// What the kernels share: addresses of tokens, the parameters of a tile of channels.
#pragma once

#include "../activations.h"
#include "calls.h"

namespace ceit::leff {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

// Row 0 of an image's tokens; the prefix tokens are in front of it.
template <class T>
CEIT_INLINE T* tokens_of(const Map& map, const Shape& shape, int64_t image) {
  return static_cast<T*>(map.data) + (image * map.rows + map.rows - shape.tokens) * shape.channels;
}

// A pair of an image and a tile of channels.
struct Task {
  int64_t image, channel;
  int channels;  // the last tile may be short
  Task(const Shape& shape, int64_t index) {
    const int64_t tiles = ceil_div(shape.channels, kTileChannels);
    image = index / tiles;
    channel = index % tiles * kTileChannels;
    channels = int(min_of(shape.channels - channel, kTileChannels));
  }
};

// Vector `v` of a tile: where it starts, and how many channels are left.
template <class Acc>
struct Slice {
  int start, count;
  CEIT_INLINE Slice(const Task& task, int v) : start(v * Lanes<Acc>::count), count(task.channels - start) {}
};

template <class Acc>
CEIT_INLINE int vectors_of(const Task& task) {
  return int(ceil_div(task.channels, Lanes<Acc>::count));
}

// Rows `mean`, `scale` and `shift` of a norm array for some channels; the identity without an array.
template <class Acc>
struct Norm {
  Vec<Acc> mean = splat(Acc(0)), scale = splat(Acc(1)), shift = splat(Acc(0));
  CEIT_INLINE Norm(const void* array, int64_t channels, int64_t channel, int count) {
    if (array == nullptr) return;
    const Acc* at = static_cast<const Acc*>(array) + channel;
    mean = load(at, count);
    scale = load(at + 3 * channels, count);
    shift = load(at + 4 * channels, count);
  }
  CEIT_INLINE Vec<Acc> operator()(Vec<Acc> z) const { return (z - mean) * scale + shift; }
};

// A gradient array for some channels; the identity without one. Of gradients that are all the same nothing is left.
template <class Acc>
struct Gradient {
  Vec<Acc> mean = splat(Acc(0)), a = splat(Acc(1)), b = splat(Acc(0)), mean_g = splat(Acc(0));
  CEIT_INLINE Gradient(const void* array, int64_t channels, int64_t channel, int count) {
    if (array == nullptr) return;
    const Acc* at = static_cast<const Acc*>(array) + channel;
    mean = load(at, count);
    a = load(at + channels, count);
    b = load(at + 2 * channels, count);
    mean_g = load(at + 3 * channels, count);
  }
  CEIT_INLINE Vec<Acc> operator()(Vec<Acc> g, Vec<Acc> z) const { return a * (g - mean_g) + b * (z - mean); }
};

// Mean and centred sum of squares of a tile of channels, merged row by row (Chan).
template <class Acc>
class Moments {
 public:
  // `line` holds `width` tokens of kTileChannels channels each.
  void add(const Acc* line, int width, int vectors) {
    const Acc n = Acc(width), before = count_, total = before + n;
    for (int v = 0; v < vectors; ++v) {
      const Acc* at = line + v * Lanes<Acc>::count;
      auto sum = splat(Acc(0)), rest = splat(Acc(0)), squares = splat(Acc(0));
      for (int x = 0; x < width; ++x) sum += load(at + x * kTileChannels);
      const auto about = sum / n;
      for (int x = 0; x < width; ++x) {
        const auto centred = load(at + x * kTileChannels) - about;
        rest += centred;
        squares += centred * centred;
      }
      // What rounding left between this number and the mean: a mean far from zero costs no digits.
      const auto mean = about + rest / n;
      squares -= rest * (rest / n);
      Acc *means = mean_ + v * Lanes<Acc>::count, *sums = squares_ + v * Lanes<Acc>::count;
      const auto difference = mean - load(means);
      store(means, load(means) + difference * (n / total));
      store(sums, load(sums) + squares + difference * difference * (before * n / total));
    }
    count_ = total;
  }
  void write(void* moments, const Shape& shape, const Task& task) const {
    Acc* at = static_cast<Acc*>(moments) + task.image * 2 * shape.channels + task.channel;
    std::memcpy(at, mean_, sizeof(Acc) * size_t(task.channels));
    std::memcpy(at + shape.channels, squares_, sizeof(Acc) * size_t(task.channels));
  }

 private:
  Acc count_ = 0;
  alignas(64) Acc mean_[kTileChannels] = {};
  alignas(64) Acc squares_[kTileChannels] = {};
};

// Row `row` of (B, rows, channels), at the task's image and channels.
template <class Acc>
CEIT_INLINE Acc* sum_row(void* sums, const Shape& shape, const Task& task, int64_t rows, int64_t row) {
  return static_cast<Acc*>(sums) + (task.image * rows + row) * shape.channels + task.channel;
}

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::leff
