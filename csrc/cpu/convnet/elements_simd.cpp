// What is between convolutions: activations, gates, sums and upsampled maps.
#include "../activations.h"
#include "calls.h"

namespace ceit::convnet {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

namespace {

template <class T>
void activate_elements(const ActivateCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  T* data = static_cast<T*>(call.data);
  const T* added = static_cast<const T*>(call.added);
  with_activation(call.activation, [&](auto kind) {
    for_vectors<Acc>(begin, end, [&](int64_t i, auto count) {
      Vec<Acc> value = load(data + i, count);
      if (added) value += load(added + i, count);
      store(data + i, activate<decltype(kind)::value, Acc>(value), count);
    });
  });
}

template <class T>
void sum(const SumCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  Acc* sums = static_cast<Acc*>(call.sums);
  for (int64_t i = begin; i < end; ++i) {
    const T* row = static_cast<const T*>(call.rows) + i * call.channels;
    for_vectors<Acc>(call.channels, [&](int64_t c, auto count) {
      store(sums + c, (i == begin ? splat(Acc(0)) : load(sums + c, count)) + load(row + c, count), count);
    });
  }
}

template <class T>
void gate(const GateCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  for_vectors<Acc>(begin, end, [&](int64_t c, auto count) {
    const Vec<Acc> x = load(static_cast<const T*>(call.x) + c, count);
    const Vec<Acc> hard = smaller<Acc>(larger<Acc>(x + Acc(3), splat(Acc(0))), splat(Acc(6))) * (Acc(1) / Acc(6));
    store(static_cast<Acc*>(call.gates) + c, call.hard ? hard : sigmoid<Acc>(x), count);
  });
}

template <class T>
void scale(const ScaleCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const T* row = static_cast<const T*>(call.rows) + i * call.channels;
    T* out = static_cast<T*>(call.out) + i * call.channels;
    for_vectors<Acc>(call.channels, [&](int64_t c, auto count) {
      store(out + c, load(row + c, count) * load(static_cast<const Acc*>(call.gates) + c, count), count);
    });
  }
}

// The pixels of a line of some size between which one of the line that is upsampled to another size lies, and the share
// of the second.
template <class Acc>
struct Between {
  int64_t first, second;
  Acc share;
  CEIT_INLINE Between(int64_t at, int64_t to, int64_t size) {
    const Acc exact = (Acc(at) + Acc(0.5)) * Acc(size) / Acc(to) - Acc(0.5), inside = exact < Acc(0) ? Acc(0) : exact;
    first = int64_t(inside), second = min_of(first + 1, size - 1), share = inside - Acc(first);
  }
};

template <class T>
void upsample(const UpsampleCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t row = call.width * call.channels;
  T* out = static_cast<T*>(call.out) + begin * row * call.factor;
  with_activation(call.activation, [&](auto kind) {
    for (int64_t y = begin; y < end; ++y) {
      const Between<Acc> rows(y, call.height * call.factor, call.height);
      const T *above = static_cast<const T*>(call.x) + rows.first * row,
              *below = static_cast<const T*>(call.x) + rows.second * row;
      for (int64_t x = 0; x < call.width * call.factor; ++x, out += call.channels) {
        const Between<Acc> columns(x, call.width * call.factor, call.width);
        const int64_t left = columns.first * call.channels, right = columns.second * call.channels;
        for_vectors<Acc>(call.channels, [&](int64_t c, auto count) {
          const auto between = [&](const T* line) {
            const Vec<Acc> a = load(line + left + c, count);
            return a + columns.share * (load(line + right + c, count) - a);
          };
          const Vec<Acc> top = between(above), value = top + rows.share * (between(below) - top);
          store(out + c, activate<decltype(kind)::value, Acc>(value), count);
        });
      }
    }
  });
}

// The four pixels of a map between which a pixel of the result lies.
template <class T>
struct Corners {
  const T *above[2], *below[2];
  acc_t<T> right, down;
};

template <class T>
void add_upsampled(const AddUpsampledCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  T* out = static_cast<T*>(call.out);
  Corners<T> corners[kMostUpsampled];
  for (int64_t pixel = begin; pixel < end; ++pixel, out += call.channels) {
    for (int i = 0; i < call.count; ++i) {
      const Upsampled& map = call.maps[i];
      const Between<Acc> rows(pixel / call.width, call.height, map.height);
      const Between<Acc> columns(pixel % call.width, call.width, map.width);
      const auto at = [&](int64_t y, int64_t x) {
        return static_cast<const T*>(map.x) + (y * map.width + x) * call.channels;
      };
      corners[i] = {{at(rows.first, columns.first), at(rows.first, columns.second)},
                    {at(rows.second, columns.first), at(rows.second, columns.second)},
                    columns.share,
                    rows.share};
    }
    with_activation(call.activation, [&](auto kind) {
      for_vectors<Acc>(call.channels, [&](int64_t c, auto count) {
        Vec<Acc> sum = load(out + c, count);
        for (int i = 0; i < call.count; ++i) {
          const Corners<T>& of = corners[i];
          const auto between = [&](const T* const(&pair)[2]) {
            const Vec<Acc> left = load(pair[0] + c, count);
            return left + of.right * (load(pair[1] + c, count) - left);
          };
          const Vec<Acc> top = between(of.above);
          sum += top + of.down * (between(of.below) - top);
        }
        store(out + c, activate<decltype(kind)::value, Acc>(sum), count);
      });
    });
  }
}

template <class T>
constexpr Kernels kernels_of() {
  return {activate_elements<T>, sum<T>, gate<T>, scale<T>, upsample<T>, add_upsampled<T>};
}

}  // namespace

extern const Kernels kernels[3] = {kernels_of<float>(), kernels_of<Bf16>(), kernels_of<double>()};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::convnet
