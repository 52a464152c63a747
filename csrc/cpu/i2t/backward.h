// The stem's backward pass: the gradient of a row of the convolution is formed and multiplied with the image's rows
// while it is in cache.
#pragma once

#include "rows.h"

namespace ceit::i2t_cpu {
namespace CEIT_CAPABILITY {
namespace {

// Pixels that are added up in one chain.
constexpr int64_t kChain = 128;

// The pooled rows whose windows hold a row of the convolution, and where it is in their windows.
struct PooledRows {
  int count = 0;
  int64_t rows[2];
  int places[2];
  CEIT_INLINE PooledRows(int64_t row, int64_t pooled_height) {
    for (int64_t i = row / 2; i <= (row + 1) / 2 && i < pooled_height; ++i) {
      rows[count] = i;
      places[count++] = int(3 * (row - 2 * i + 1));
    }
  }
};

// The gradient of the weight, of a row's gradient and some rows of the image, at the seven places of the kernel's row.
template <class Acc>
struct WeightTile {
  static constexpr int lanes = Lanes<Acc>::count, vectors = kVectorBytes == 64 ? 2 : 1;
  static constexpr int channels = vectors * lanes;
};

template <class Acc, int kRows>
inline void accumulate(const Acc* gradient, int64_t stride, int64_t width, const Acc* const* rows, Acc* out) {
  using Size = WeightTile<Acc>;
  for (int64_t start = 0; start < width; start += kChain) {
    const int64_t end = start + kChain < width ? start + kChain : width;
    Vec<Acc> sums[kRows * kSide][Size::vectors] = {};
    const Acc* pixels[kRows];
    for (int row = 0; row < kRows; ++row) pixels[row] = rows[row] + kStride * start;
    for (int64_t x = start; x < end; ++x) {
      Vec<Acc> g[Size::vectors];
#pragma GCC unroll 2
      for (int v = 0; v < Size::vectors; ++v) g[v] = load(gradient + x * stride + v * Size::lanes);
#pragma GCC unroll 2
      for (int row = 0; row < kRows; ++row) {
        forget(pixels[row]);
#pragma GCC unroll 7
        for (int tap = 0; tap < kSide; ++tap) {
          const auto pixel = splat(pixels[row][tap]);
#pragma GCC unroll 2
          for (int v = 0; v < Size::vectors; ++v) sums[row * kSide + tap][v] += pixel * g[v];
        }
        pixels[row] += kStride;
      }
    }
#pragma GCC unroll 14
    for (int tap = 0; tap < kRows * kSide; ++tap) {
#pragma GCC unroll 2
      for (int v = 0; v < Size::vectors; ++v) {
        Acc* at = out + tap * kPanelChannels + v * Size::lanes;
        store(at, load(at) + sums[tap][v]);
      }
    }
  }
}

template <class T>
class Part {
 public:
  using Acc = acc_t<T>;
  explicit Part(const BackwardCall& call)
      : call_(call),
        convolved_(call.convolution, true),
        gradient_(call.convolution.sizes.conv_width * convolved_.stride()),
        centred_sums_(convolved_.stride()) {}

  void run(int64_t part) {
    const Sizes& s = call_.convolution.sizes;
    const int64_t rows = s.batch * s.conv_height, taps = s.in_channels * kSide * kSide;
    Acc* grad_weight = static_cast<Acc*>(call_.grad_weight) + part * s.panels * taps * kPanelChannels;
    std::memset(grad_weight, 0, sizeof(Acc) * size_t(s.panels * taps * kPanelChannels));
    std::memset(centred_sums_.get(), 0, sizeof(Acc) * size_t(convolved_.stride()));
    for (int64_t i = rows * part / call_.parts; i < rows * (part + 1) / call_.parts; ++i) {
      form_gradient(i / s.conv_height, i % s.conv_height);
      multiply(i / s.conv_height, i % s.conv_height, grad_weight);
    }
    std::memcpy(static_cast<Acc*>(call_.centred_sums) + part * s.out_channels, centred_sums_.get(),
                sizeof(Acc) * size_t(s.out_channels));
  }

 private:
  // dz of a row of the convolution.
  void form_gradient(int64_t image, int64_t y) {
    const Sizes& s = call_.convolution.sizes;
    const int64_t stride = convolved_.stride(), channels = s.out_channels;
    const Acc* z = convolved_.row(image, y);
    T* result = static_cast<T*>(call_.grad_convolution);
    if (result) result += (image * s.conv_height + y) * s.conv_width * channels;
    const PooledRows pooled(y, s.pooled_height);
    for_vectors<Acc>(channels, [&](int64_t c, auto n) {
      const Acc* coefficients = static_cast<const Acc*>(call_.coefficients) + c;
      const auto mean = load(coefficients, n), a = load(coefficients + channels, n);
      const auto b = load(coefficients + 2 * channels, n), mean_g = load(coefficients + 3 * channels, n);
      auto centred_sum = splat(Acc(0));
      const auto put = [&](int64_t x, Vec<Acc> g) {
        const auto centred = load(z + x * stride + c) - mean;
        centred_sum += g * centred;
        const auto dz = a * (g - mean_g) + b * centred;
        store(gradient_.get() + x * stride + c, dz);
        if (result) store(result + x * channels + c, dz, n);
      };
      // A cell's window has three columns, of which the first is also the last of the cell before.
      auto carried = splat(Acc(0));
      for (int64_t j = 0; j < s.pooled_width; ++j) {
        auto first = carried, second = splat(Acc(0)), third = splat(Acc(0));
        for (int i = 0; i < pooled.count; ++i) {
          const int64_t at = ((image * s.pooled_height + pooled.rows[i]) * s.pooled_width + j) * channels + c;
          const auto g = load(static_cast<const T*>(call_.gradient) + at, n);
          const auto column = load_places<Acc>(call_.indices + at, n) - pooled.places[i];
          first += column == 0 ? g : splat(Acc(0));
          second += column == 1 ? g : splat(Acc(0));
          third += column == 2 ? g : splat(Acc(0));
        }
        if (j > 0) put(2 * j - 1, first);
        put(2 * j, second);
        carried = third;
      }
      if (s.conv_width % 2 == 0) put(s.conv_width - 1, carried);
      store(centred_sums_.get() + c, load(centred_sums_.get() + c) + centred_sum);
    });
  }

  void multiply(int64_t image, int64_t y, Acc* grad_weight) {
    const Sizes& s = call_.convolution.sizes;
    const int64_t lines = s.in_channels * kSide, stride = convolved_.stride();
    const Acc* around[kSide];
    convolved_.image().around(image, y, around);
    for (int64_t c = 0; c < stride; c += WeightTile<Acc>::channels) {
      const Acc* gradient = gradient_.get() + c;
      Acc* out = grad_weight + c / kPanelChannels * lines * kSide * kPanelChannels + c % kPanelChannels;
      for (int64_t line = 0; line < lines; line += 2, out += 2 * kSide * kPanelChannels) {
        const Acc* rows[2];
        for (int64_t i = 0; i < 2 && line + i < lines; ++i)
          rows[i] = around[(line + i) % kSide] + (line + i) / kSide * convolved_.image().stride();
        if (line + 1 < lines)
          accumulate<Acc, 2>(gradient, stride, s.conv_width, rows, out);
        else
          accumulate<Acc, 1>(gradient, stride, s.conv_width, rows, out);
      }
    }
  }

  const BackwardCall& call_;
  ConvolvedRows<T> convolved_;
  const Scratch<Acc> gradient_;
  const Scratch<Acc> centred_sums_;
};

}  // namespace

template <class T>
void sums(const SumsCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t channels = call.channels, size = call.width * channels;
  for_vectors<Acc>(channels, [&](int64_t c, auto n) {
    const auto mean = load(static_cast<const Acc*>(call.mean) + c, n);
    for (int64_t row = begin; row < end; ++row) {
      const T* gradient = static_cast<const T*>(call.gradient) + row * size;
      const T* x = static_cast<const T*>(call.x) + row * size;
      auto sum = splat(Acc(0)), centred_sum = splat(Acc(0));
      for (int64_t at = c; at < size; at += channels) {
        const auto g = load(gradient + at, n);
        sum += g;
        centred_sum += g * (load(x + at, n) - mean);
      }
      Acc* to = static_cast<Acc*>(call.sums) + row * 2 * channels + c;
      store(to, sum, n);
      store(to + channels, centred_sum, n);
    }
  });
}

template <class T>
void backward(const BackwardCall& call, int64_t begin, int64_t end) {
  Part<T> part(call);
  for (int64_t i = begin; i < end; ++i) part.run(i);
}

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::i2t_cpu
