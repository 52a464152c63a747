// What the stages share: addresses of tokens, the parameters of a block of channels.
#pragma once

#include "../activations.h"
#include "../scratch.h"
#include "calls.h"

namespace ceit::leff {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

// Row 0 of an image's tokens; the prefix tokens are in front of it.
template <class T>
CEIT_INLINE T* tokens_of(const Map& map, const Shape& shape, int64_t image) {
  return static_cast<T*>(map.data) + (image * map.rows + map.rows - shape.tokens) * shape.channels;
}

// A pair of an image and a block of channels.
struct Task {
  int64_t image, channel;
  int channels;  // of this block, the last may be short
  Task(const Shape& shape, int64_t index) {
    const int64_t blocks = (shape.channels + kBlock - 1) / kBlock;
    image = index / blocks;
    channel = index % blocks * kBlock;
    channels = int(shape.channels - channel < kBlock ? shape.channels - channel : kBlock);
  }
};

// Lane `v` of a block: where it starts, and how many channels are left.
template <class Real>
struct Slice {
  int start, count;
  CEIT_INLINE Slice(const Task& task, int v) : start(v * Lanes<Real>::count), count(task.channels - start) {}
};

template <class Real>
CEIT_INLINE int vectors_of(const Task& task) {
  return (task.channels + Lanes<Real>::count - 1) / Lanes<Real>::count;
}

// Rows `mean`, `scale` and `shift` of a norm array for some channels; the identity without an array.
template <class Real>
struct Norm {
  Vec<Real> mean = splat(Real(0)), scale = splat(Real(1)), shift = splat(Real(0));
  CEIT_INLINE Norm(const void* array, int64_t channels, int64_t channel, int count) {
    if (array == nullptr) return;
    const Real* at = static_cast<const Real*>(array) + channel;
    mean = load(at, count);
    scale = load(at + 3 * channels, count);
    shift = load(at + 4 * channels, count);
  }
  CEIT_INLINE Vec<Real> operator()(Vec<Real> z) const { return (z - mean) * scale + shift; }
};

// A gradient array for some channels; the identity without one.
template <class Real>
struct Gradient {
  Vec<Real> mean = splat(Real(0)), a = splat(Real(1)), b = splat(Real(0)), c = splat(Real(0));
  CEIT_INLINE Gradient(const void* array, int64_t channels, int64_t channel, int count) {
    if (array == nullptr) return;
    const Real* at = static_cast<const Real*>(array) + channel;
    mean = load(at, count);
    a = load(at + channels, count);
    b = load(at + 2 * channels, count);
    c = load(at + 3 * channels, count);
  }
  CEIT_INLINE Vec<Real> operator()(Vec<Real> g, Vec<Real> z) const { return a * g + (b * (z - mean) + c); }
};

// Mean and centred sum of squares of a block of channels, merged row by row (Chan).
template <class Real>
class Moments {
 public:
  // `line` holds `width` tokens of kBlock channels each.
  void add(const Real* line, int width, int vectors) {
    const Real n = Real(width), before = count_, total = before + n;
    for (int v = 0; v < vectors; ++v) {
      const Real* at = line + v * Lanes<Real>::count;
      auto sum = splat(Real(0)), squares = splat(Real(0));
      for (int x = 0; x < width; ++x) sum += load(at + x * kBlock);
      const auto mean = sum / n;
      for (int x = 0; x < width; ++x) {
        const auto centred = load(at + x * kBlock) - mean;
        squares += centred * centred;
      }
      Real *means = mean_ + v * Lanes<Real>::count, *sums = squares_ + v * Lanes<Real>::count;
      const auto difference = mean - load(means);
      store(means, load(means) + difference * (n / total));
      store(sums, load(sums) + squares + difference * difference * (before * n / total));
    }
    count_ = total;
  }
  void write(void* moments, const Shape& shape, const Task& task) const {
    Real* at = static_cast<Real*>(moments) + task.image * 2 * shape.channels + task.channel;
    std::memcpy(at, mean_, sizeof(Real) * size_t(task.channels));
    std::memcpy(at + shape.channels, squares_, sizeof(Real) * size_t(task.channels));
  }

 private:
  Real count_ = 0;
  alignas(64) Real mean_[kBlock] = {};
  alignas(64) Real squares_[kBlock] = {};
};

// Row `row` of (B, rows, channels), at the task's image and channels.
template <class Real>
CEIT_INLINE Real* sum_row(void* sums, const Shape& shape, const Task& task, int64_t rows, int64_t row) {
  return static_cast<Real*>(sums) + (task.image * rows + row) * shape.channels + task.channel;
}

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::leff
