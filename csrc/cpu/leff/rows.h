// The kernels that take tokens one by one: norms, activations, their sums and gradients.
#pragma once

#include "tiles.h"

namespace ceit::leff {
namespace CEIT_CAPABILITY {
namespace {

// A tile of rows of one image.
struct RowTask {
  int64_t image, first, last;
  RowTask(int64_t rows, int64_t index) {
    const int64_t tiles = ceil_div(rows, kTileRows);
    image = index / tiles;
    first = index % tiles * kTileRows;
    last = min_of(first + kTileRows, rows);
  }
};

// Adds up pairs of vectors of an image's tokens, kTileRows at a time: one chain of additions would lose digits.
template <class Acc>
class PairSum {
 public:
  // Calls add(row, first, second) for every token, which adds to the two vectors.
  template <class Add>
  CEIT_INLINE PairSum(int64_t tokens, Add add) {
    for (int64_t start = 0; start < tokens; start += kTileRows) {
      const int64_t end = min_of(start + kTileRows, tokens);
      auto first = splat(Acc(0)), second = splat(Acc(0));
      for (int64_t row = start; row < end; ++row) add(row, first, second);
      first_ += first;
      second_ += second;
    }
  }
  CEIT_INLINE void write(void* sums, const Shape& shape, const Task& task, const Slice<Acc>& s) const {
    store(sum_row<Acc>(sums, shape, task, 2, 0) + s.start, first_, s.count);
    store(sum_row<Acc>(sums, shape, task, 2, 1) + s.start, second_, s.count);
  }

 private:
  Vec<Acc> first_ = splat(Acc(0)), second_ = splat(Acc(0));
};

template <class T>
void zero_prefix(const Map& map, const Shape& shape, const RowTask& task) {
  if (task.first != 0) return;
  const int64_t prefix = (map.rows - shape.tokens) * shape.channels;
  std::memset(static_cast<void*>(tokens_of<T>(map, shape, task.image) - prefix), 0, sizeof(T) * size_t(prefix));
}

}  // namespace

template <class T>
void moments(const MomentsCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const Scratch<Acc> line(kTileRows * kTileChannels);
  for (int64_t index = begin; index < end; ++index) {
    const Task task(call.shape, index);
    const T* in = tokens_of<const T>(call.in, call.shape, task.image) + task.channel;
    const int vectors = vectors_of<Acc>(task);
    Moments<Acc> result;
    for (int64_t first = 0; first < call.shape.tokens; first += kTileRows) {
      const int rows = int(min_of(call.shape.tokens - first, kTileRows));
      for (int x = 0; x < rows; ++x) {
        const T* from = in + (first + x) * call.shape.channels;
        for (int v = 0; v < vectors; ++v) {
          const Slice<Acc> s(task, v);
          store(line.get() + x * kTileChannels + s.start, load(from + s.start, s.count));
        }
      }
      result.add(line.get(), rows, vectors);
    }
    result.write(call.moments, call.shape, task);
  }
}

template <class T>
void activate_rows(const ActivateCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t channels = call.shape.channels;
  for (int64_t index = begin; index < end; ++index) {
    const RowTask task(call.shape.tokens, index);
    const T* in = tokens_of<const T>(call.in, call.shape, task.image);
    T* out = tokens_of<T>(call.out, call.shape, task.image);
    with_activation(call.activation, [&](auto kind) {
      for_vectors<Acc>(channels, [&](int64_t c, int count) {
        const Norm<Acc> norm(call.norm, channels, c, count);
        for (int64_t at = task.first * channels + c; at < task.last * channels; at += channels) {
          __builtin_prefetch(in + at + kPrefetchChannels);
          store(out + at, activate<decltype(kind)::value, Acc>(norm(load(in + at, count))), count);
        }
      });
    });
  }
}

template <class T>
void activate_backward(const ActivateBackwardCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t channels = call.shape.channels;
  for (int64_t index = begin; index < end; ++index) {
    const Task task(call.shape, index);
    T* g = tokens_of<T>(call.g, call.shape, task.image) + task.channel;
    const T* z = tokens_of<const T>(call.z, call.shape, task.image) + task.channel;
    T* activated = call.activated ? static_cast<T*>(call.activated) + task.channel - call.first : nullptr;
    with_activation(call.activation, [&](auto kind) {
      for (int v = 0; v < vectors_of<Acc>(task); ++v) {
        const Slice<Acc> s(task, v);
        const Norm<Acc> norm(call.norm, channels, task.channel + s.start, s.count);
        const PairSum<Acc> sums(call.shape.tokens, [&](int64_t row, auto& sum, auto& centred) {
          const int64_t at = row * channels + s.start;
          const auto value = load(z + at, s.count);
          const auto both = activate_with_slope<decltype(kind)::value, Acc>(norm(value));
          const auto result = load(g + at, s.count) * both.slope;
          __builtin_prefetch(z + at + kPrefetch * channels);
          __builtin_prefetch(g + at + kPrefetch * channels);
          store(g + at, result, s.count);
          if (activated) store(activated + row * call.stride + s.start, both.value, s.count);
          sum += result;
          centred += result * (value - norm.mean);
        });
        sums.write(call.sums, call.shape, task, s);
      }
    });
  }
}

template <class T>
void sums(const SumsCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t channels = call.shape.channels;
  for (int64_t index = begin; index < end; ++index) {
    const Task task(call.shape, index);
    const T* g = tokens_of<const T>(call.g, call.shape, task.image) + task.channel;
    const T* z = call.z.data ? tokens_of<const T>(call.z, call.shape, task.image) + task.channel : nullptr;
    for (int v = 0; v < vectors_of<Acc>(task); ++v) {
      const Slice<Acc> s(task, v);
      const Norm<Acc> norm(call.norm, channels, task.channel + s.start, s.count);
      const PairSum<Acc> sums(call.shape.tokens, [&](int64_t row, auto& sum, auto& centred) {
        const int64_t at = row * channels + s.start;
        const auto value = load(g + at, s.count);
        sum += value;
        if (z) centred += value * (load(z + at, s.count) - norm.mean);
      });
      sums.write(call.sums, call.shape, task, s);
    }
  }
}

template <class T>
void gradient(const GradientCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t channels = call.shape.channels;
  for (int64_t index = begin; index < end; ++index) {
    const RowTask task(call.shape.tokens, index);
    const T* g = tokens_of<const T>(call.g, call.shape, task.image);
    const T* z = call.z.data ? tokens_of<const T>(call.z, call.shape, task.image) : nullptr;
    T* out = tokens_of<T>(call.out, call.shape, task.image);
    for_vectors<Acc>(call.first, call.last, [&](int64_t c, int count) {
      const Gradient<Acc> of(call.gradient, channels, c, count);
      for (int64_t row = task.first; row < task.last; ++row) {
        const int64_t at = row * channels + c;
        store(out + at, z ? of(load(g + at, count), load(z + at, count)) : load(g + at, count), count);
      }
    });
    if (call.first == 0) zero_prefix<T>(call.out, call.shape, task);
  }
}

template <class T, class Out>
void finish(const FinishCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t channels = call.shape.channels, prefix = call.out.rows - call.shape.tokens;
  for (int64_t index = begin; index < end; ++index) {
    const RowTask task(call.out.rows, index);
    const int64_t start = task.image * call.out.rows * channels;
    const T* z = tokens_of<const T>(call.z, call.shape, task.image);
    const Out* x = static_cast<const Out*>(call.x.data) + start;
    const Out* residual = call.residual ? static_cast<const Out*>(call.residual) + start : nullptr;
    Out* out = static_cast<Out*>(call.out.data) + start;
    for_vectors<Acc>(channels, [&](int64_t c, int count) {
      const Norm<Acc> norm(call.norm, channels, c, count);
      for (int64_t row = task.first; row < task.last; ++row) {
        const int64_t at = row * channels + c;
        auto value = row < prefix ? load(x + at, count) : norm(load(z + at - prefix * channels, count));
        if (residual) value += load(residual + at, count);
        store(out + at, value, count);
      }
    });
  }
}

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::leff
