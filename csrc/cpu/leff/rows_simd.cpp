// The stages that take tokens one by one: norms, activations, their sums and gradients.
#include "rows_simd.h"

#include "../tile.h"
#include "blocks.h"

namespace ceit::leff {
namespace CEIT_CAPABILITY {
namespace {

// A block of rows of one image.
struct RowTask {
  int64_t image, first, last;
  RowTask(int64_t rows, int64_t index) {
    const int64_t blocks = (rows + kRows - 1) / kRows;
    image = index / blocks;
    first = index % blocks * kRows;
    last = first + kRows < rows ? first + kRows : rows;
  }
};

// Calls body(channel, count) for every vector of channels.
template <class Real, class Body>
CEIT_INLINE void for_vectors(int64_t first, int64_t last, Body body) {
  constexpr int lanes = Lanes<Real>::count;
  for (int64_t c = first; c < last; c += lanes) body(c, int(last - c < lanes ? last - c : lanes));
}
template <class Real, class Body>
CEIT_INLINE void for_vectors(int64_t channels, Body body) {
  for_vectors<Real>(0, channels, body);
}

// Adds up pairs of vectors of an image's tokens, kRows at a time: one chain of additions would lose digits.
template <class Real>
class PairSum {
 public:
  // Calls add(row, first, second) for every token, which adds to the two vectors.
  template <class Add>
  CEIT_INLINE PairSum(int64_t tokens, Add add) {
    for (int64_t start = 0; start < tokens; start += kRows) {
      const int64_t end = start + kRows < tokens ? start + kRows : tokens;
      auto first = splat(Real(0)), second = splat(Real(0));
      for (int64_t row = start; row < end; ++row) add(row, first, second);
      first_ += first;
      second_ += second;
    }
  }
  CEIT_INLINE void write(void* sums, const Shape& shape, const Task& task, const Slice<Real>& s) const {
    store(sum_row<Real>(sums, shape, task, 2, 0) + s.start, first_, s.count);
    store(sum_row<Real>(sums, shape, task, 2, 1) + s.start, second_, s.count);
  }

 private:
  Vec<Real> first_ = splat(Real(0)), second_ = splat(Real(0));
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
  using Real = RealOf<T>;
  const Scratch<Real> line(kRows * kBlock);
  for (int64_t index = begin; index < end; ++index) {
    const Task task(call.shape, index);
    const T* in = tokens_of<const T>(call.in, call.shape, task.image) + task.channel;
    const int vectors = vectors_of<Real>(task);
    Moments<Real> result;
    for (int64_t first = 0; first < call.shape.tokens; first += kRows) {
      const int rows = int(call.shape.tokens - first < kRows ? call.shape.tokens - first : kRows);
      for (int x = 0; x < rows; ++x) {
        const T* from = in + (first + x) * call.shape.channels;
        for (int v = 0; v < vectors; ++v) {
          const Slice<Real> s(task, v);
          store(line.get() + x * kBlock + s.start, load(from + s.start, s.count));
        }
      }
      result.add(line.get(), rows, vectors);
    }
    result.write(call.moments, call.shape, task);
  }
}

template <class T>
void activate_rows(const ActivateCall& call, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const int64_t channels = call.shape.channels;
  for (int64_t index = begin; index < end; ++index) {
    const RowTask task(call.shape.tokens, index);
    const T* in = tokens_of<const T>(call.in, call.shape, task.image);
    T* out = tokens_of<T>(call.out, call.shape, task.image);
    with_activation(call.activation, [&](auto kind) {
      for_vectors<Real>(channels, [&](int64_t c, int count) {
        const Norm<Real> norm(call.norm, channels, c, count);
        for (int64_t at = task.first * channels + c; at < task.last * channels; at += channels)
          store(out + at, activate<decltype(kind)::value, Real>(norm(load(in + at, count))), count);
      });
    });
  }
}

template <class T>
void activate_backward(const ActivateBackwardCall& call, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const int64_t channels = call.shape.channels;
  for (int64_t index = begin; index < end; ++index) {
    const Task task(call.shape, index);
    const T* g = tokens_of<const T>(call.g, call.shape, task.image) + task.channel;
    const T* z = tokens_of<const T>(call.z, call.shape, task.image) + task.channel;
    T* dz = tokens_of<T>(call.dz, call.shape, task.image) + task.channel;
    T* out = call.out.data ? tokens_of<T>(call.out, call.shape, task.image) + task.channel : nullptr;
    if (call.part.data) out = static_cast<T*>(call.part.data) + task.channel - call.part.channel;
    const int64_t out_stride = call.part.data ? call.part.stride : channels;
    with_activation(call.activation, [&](auto kind) {
      for (int v = 0; v < vectors_of<Real>(task); ++v) {
        const Slice<Real> s(task, v);
        const Norm<Real> norm(call.norm, channels, task.channel + s.start, s.count);
        const PairSum<Real> sums(call.shape.tokens, [&](int64_t row, auto& sum, auto& centred) {
          const int64_t at = row * channels + s.start;
          const auto value = load(z + at, s.count);
          const auto both = activate_with_slope<decltype(kind)::value, Real>(norm(value));
          const auto result = load(g + at, s.count) * both.slope;
          __builtin_prefetch(z + at + kPrefetch * channels);
          __builtin_prefetch(g + at + kPrefetch * channels);
          store(dz + at, result, s.count);
          if (out) store(out + row * out_stride + s.start, both.value, s.count);
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
  using Real = RealOf<T>;
  const int64_t channels = call.shape.channels;
  for (int64_t index = begin; index < end; ++index) {
    const Task task(call.shape, index);
    const T* g = tokens_of<const T>(call.g, call.shape, task.image) + task.channel;
    const T* z = call.z.data ? tokens_of<const T>(call.z, call.shape, task.image) + task.channel : nullptr;
    for (int v = 0; v < vectors_of<Real>(task); ++v) {
      const Slice<Real> s(task, v);
      const Norm<Real> norm(call.norm, channels, task.channel + s.start, s.count);
      const PairSum<Real> sums(call.shape.tokens, [&](int64_t row, auto& sum, auto& centred) {
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
  using Real = RealOf<T>;
  const int64_t channels = call.shape.channels;
  for (int64_t index = begin; index < end; ++index) {
    const RowTask task(call.shape.tokens, index);
    const T* g = tokens_of<const T>(call.g, call.shape, task.image);
    const T* z = call.z.data ? tokens_of<const T>(call.z, call.shape, task.image) : nullptr;
    T* out = call.part.data ? static_cast<T*>(call.part.data) - call.part.channel
                            : tokens_of<T>(call.out, call.shape, task.image);
    const int64_t out_stride = call.part.data ? call.part.stride : channels;
    for_vectors<Real>(call.first, call.last, [&](int64_t c, int count) {
      const Gradient<Real> of(call.gradient, channels, c, count);
      for (int64_t row = task.first; row < task.last; ++row) {
        const int64_t at = row * channels + c;
        store(out + row * out_stride + c, z ? of(load(g + at, count), load(z + at, count)) : load(g + at, count),
              count);
      }
    });
    if (!call.part.data) zero_prefix<T>(call.out, call.shape, task);
  }
}

template <class T, class Out>
void finish(const FinishCall& call, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const int64_t channels = call.shape.channels, prefix = call.out.rows - call.shape.tokens;
  for (int64_t index = begin; index < end; ++index) {
    const RowTask task(call.out.rows, index);
    const int64_t start = task.image * call.out.rows * channels;
    const T* z = tokens_of<const T>(call.z, call.shape, task.image);
    const Out* x = static_cast<const Out*>(call.x.data) + start;
    const Out* residual = call.residual ? static_cast<const Out*>(call.residual) + start : nullptr;
    Out* out = static_cast<Out*>(call.out.data) + start;
    for_vectors<Real>(channels, [&](int64_t c, int count) {
      const Norm<Real> norm(call.norm, channels, c, count);
      for (int64_t row = task.first; row < task.last; ++row) {
        const int64_t at = row * channels + c;
        auto value = row < prefix ? load(x + at, count) : norm(load(z + at - prefix * channels, count));
        if (residual) value += load(residual + at, count);
        store(out + at, value, count);
      }
    });
  }
}

template <class T>
void transpose(const TransposeCall& call, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  constexpr int lanes = Lanes<Real>::count;
  const T* in = static_cast<const T*>(call.in);
  T* out = static_cast<T*>(call.out);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index * kRows, last = first + kRows < call.rows ? first + kRows : call.rows;
    for (int64_t c = 0; c < call.columns; c += lanes) {
      const int columns = int(call.columns - c < lanes ? call.columns - c : lanes);
      for (int64_t r = first; r < last; r += lanes) {
        const int rows = int(last - r < lanes ? last - r : lanes);
        Square<Real> square;
        for (int i = 0; i < lanes; ++i)
          square.rows[i] = i < rows ? load(in + (r + i) * call.columns + c, columns) : splat(Real(0));
        square.transpose();
        for (int j = 0; j < columns; ++j) store(out + (c + j) * call.out_stride + r, square.rows[j], rows);
      }
    }
  }
}

#define CEIT_INSTANTIATE(T)                                                          \
  template void moments<T>(const MomentsCall&, int64_t, int64_t);                    \
  template void activate_rows<T>(const ActivateCall&, int64_t, int64_t);             \
  template void activate_backward<T>(const ActivateBackwardCall&, int64_t, int64_t); \
  template void sums<T>(const SumsCall&, int64_t, int64_t);                          \
  template void gradient<T>(const GradientCall&, int64_t, int64_t);                  \
  template void finish<T, T>(const FinishCall&, int64_t, int64_t);                   \
  template void transpose<T>(const TransposeCall&, int64_t, int64_t);
CEIT_INSTANTIATE(float)
CEIT_INSTANTIATE(Bf16)
CEIT_INSTANTIATE(double)
#undef CEIT_INSTANTIATE
template void finish<Bf16, float>(const FinishCall&, int64_t, int64_t);

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::leff
