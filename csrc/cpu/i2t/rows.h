// Rows of the image with their padding, and rows of the convolution, computed when they are first asked for.
#pragma once

#include <type_traits>

#include "../scalar.h"
#include "../vector.h"
#include "calls.h"

namespace ceit::i2t_cpu {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

// What the registers hold: pixels of the convolution by vectors of output channels.
template <class Acc>
struct Tile {
  static constexpr int lanes = Lanes<Acc>::count, vectors = 2, pixels = kVectorBytes == 64 ? 14 : 6;
  static constexpr int channels = vectors * lanes;
};

// Mean, scale and shift of some channels, from an array of three rows; the identity without one.
template <class Acc>
struct Norm {
  Vec<Acc> mean = splat(Acc(0)), scale = splat(Acc(1)), shift = splat(Acc(0));
  CEIT_INLINE Norm() = default;
  CEIT_INLINE Norm(const void* array, int64_t channels, int64_t channel, int count) {
    const Acc* at = static_cast<const Acc*>(array) + channel;
    mean = load(at, count);
    scale = load(at + channels, count);
    shift = load(at + 2 * channels, count);
  }
  CEIT_INLINE Vec<Acc> operator()(Vec<Acc> z) const { return (z - mean) * scale + shift; }
};

// Rows of the image in the type that is computed in, padded, one channel behind another; zero beyond the image.
template <class T>
class ImageRows {
 public:
  using Acc = acc_t<T>;
  explicit ImageRows(const Convolution& convolution)
      : convolution_(convolution),
        stride_(padded_width(convolution.sizes)),
        rows_((kSlots + 1) * convolution.sizes.in_channels * stride_) {
    for (auto& row : held_) row = -1;
  }

  // From one channel to the next.
  int64_t stride() const { return stride_; }

  // The rows that row `y` of an image's convolution reads.
  void around(int64_t image, int64_t y, const Acc* (&rows)[kSide]) {
    for (int i = 0; i < kSide; ++i) rows[i] = row(image, kStride * y - kPadding + i);
  }

 private:
  static constexpr int kSlots = 8;  // more than a row of the convolution reads

  // A last tile may reach beyond the row.
  static int64_t padded_width(const Sizes& sizes) {
    const int64_t reach = kStride * (sizes.conv_width + Tile<Acc>::pixels) + kSide;
    return reach > sizes.width + 2 * kPadding ? reach : sizes.width + 2 * kPadding;
  }

  const Acc* row(int64_t image, int64_t y) {
    const Sizes& s = convolution_.sizes;
    const int64_t size = s.in_channels * stride_;
    if (y < 0 || y >= s.height) return rows_.get() + kSlots * size;
    const int slot = int(y % kSlots);
    Acc* to = rows_.get() + slot * size;
    const int64_t wanted = image * s.height + y;
    if (held_[slot] != wanted) {
      held_[slot] = wanted;
      const T* from = static_cast<const T*>(convolution_.image) + image * s.strides[0] + y * s.strides[2];
      for (int64_t i = 0; i < s.in_channels; ++i) copy(from + i * s.strides[1], to + i * stride_ + kPadding);
    }
    return to;
  }

  void copy(const T* from, Acc* to) const {
    const int64_t width = convolution_.sizes.width, stride = convolution_.sizes.strides[3];
    if (stride == 1) return for_vectors<Acc>(width, [&](int64_t x, auto n) { store(to + x, load(from + x, n), n); });
    for (int64_t x = 0; x < width; ++x) to[x] = value_of(from[x * stride]);
  }

  const Convolution& convolution_;
  const int64_t stride_;
  const Scratch<Acc> rows_;
  int64_t held_[kSlots];
};

// Keeps the compiler from carrying pixels from one step of a loop to the next: it would spill them, where a broadcast
// from memory costs nothing.
template <class T>
CEIT_INLINE void forget(const T*& pointer) {
  asm("" : "+r"(pointer));
}

// One tile of a row of the convolution: `rows` start at its first pixel.
template <class Acc>
inline void convolve_tile(const Acc* const (&rows)[kSide], int64_t row_stride, int64_t in_channels, const Acc* weight,
                          Acc* out, int64_t out_stride) {
  using Size = Tile<Acc>;
  Vec<Acc> sums[Size::pixels][Size::vectors] = {};
  for (int64_t i = 0; i < in_channels; ++i) {
    for (const Acc* base : rows) {
      const Acc* row = base + i * row_stride;
#pragma GCC unroll 1  // or sums of the steps beside each other would not fit in registers
      for (int tap = 0; tap < kSide; ++tap, ++row, weight += kPanelChannels) {
        forget(row);
        Vec<Acc> taps[Size::vectors];
#pragma GCC unroll 2
        for (int v = 0; v < Size::vectors; ++v) taps[v] = load(weight + v * Size::lanes);
#pragma GCC unroll 14
        for (int p = 0; p < Size::pixels; ++p) {
          const auto pixel = splat(row[kStride * p]);
#pragma GCC unroll 2
          for (int v = 0; v < Size::vectors; ++v) sums[p][v] += pixel * taps[v];
        }
      }
    }
  }
#pragma GCC unroll 14
  for (int p = 0; p < Size::pixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < Size::vectors; ++v) store(out + p * out_stride + v * Size::lanes, sums[p][v]);
  }
}

// Rows of the convolution (conv_width, panels * kPanelChannels); with `rounds` in the type of the result, of which
// batch statistics are taken: about another mean a norm would magnify the rounding.
template <class T>
class ConvolvedRows {
 public:
  using Acc = acc_t<T>;
  ConvolvedRows(const Convolution& convolution, bool rounds)
      : convolution_(convolution),
        rounds_(rounds && !std::is_same_v<T, Acc>),
        image_(convolution),
        rows_(kSlots * (convolution.sizes.conv_width + Tile<Acc>::pixels) * convolution.sizes.panels * kPanelChannels) {
    for (auto& row : held_) row = -1;
  }

  ImageRows<T>& image() { return image_; }
  // From one pixel to the next.
  int64_t stride() const { return convolution_.sizes.panels * kPanelChannels; }

  // Row `y` of an image; the last few that were asked for stay.
  Acc* row(int64_t image, int64_t y) {
    const Sizes& s = convolution_.sizes;
    const int slot = int(y % kSlots);
    Acc* out = rows_.get() + slot * (s.conv_width + Tile<Acc>::pixels) * stride();
    const int64_t wanted = image * s.conv_height + y;
    if (held_[slot] != wanted) {
      held_[slot] = wanted;
      convolve(image, y, out);
      if (rounds_) round(out);
      finite_[slot] = all_finite(out);
    }
    return out;
  }
  // Whether row `y`, which was asked for lately, holds neither infinity nor what is no number.
  bool is_finite(int64_t y) const { return finite_[y % kSlots]; }

 private:
  static constexpr int kSlots = 4;

  void convolve(int64_t image, int64_t y, Acc* out) {
    const Sizes& s = convolution_.sizes;
    const int64_t taps = s.in_channels * kSide * kSide;
    const Acc* lines[kSide];
    image_.around(image, y, lines);
    for (int64_t c = 0; c < stride(); c += Tile<Acc>::channels) {
      const Acc* weight = static_cast<const Acc*>(convolution_.weight) + c / kPanelChannels * taps * kPanelChannels +
                          c % kPanelChannels;
      for (int64_t x = 0; x < s.conv_width; x += Tile<Acc>::pixels) {
        const Acc* at[kSide];
        for (int i = 0; i < kSide; ++i) at[i] = lines[i] + kStride * x;
        convolve_tile<Acc>(at, image_.stride(), s.in_channels, weight, out + x * stride() + c, stride());
      }
    }
  }

  void round(Acc* row) const {
    T rounded[Lanes<Acc>::count];
    for (int64_t at = 0; at < convolution_.sizes.conv_width * stride(); at += Lanes<Acc>::count) {
      store(rounded, load(row + at));
      store(row + at, load(rounded));
    }
  }

  bool all_finite(const Acc* row) const {
    Vec<Acc> zeros[2] = {};
    for (int64_t at = 0; at < convolution_.sizes.conv_width * stride(); at += 2 * Lanes<Acc>::count)
      for (int i = 0; i < 2; ++i) zeros[i] += load(row + at + i * Lanes<Acc>::count) * Acc(0);
    const auto sum = zeros[0] + zeros[1];
    for (int i = 0; i < Lanes<Acc>::count; ++i)
      if (!(sum[i] == 0)) return false;
    return true;
  }

  const Convolution& convolution_;
  bool rounds_;
  ImageRows<T> image_;
  const Scratch<Acc> rows_;
  int64_t held_[kSlots];
  bool finite_[kSlots];
};

// Places of maxima in their windows: bytes in memory, as wide as the values in registers.
template <class Acc>
using Places = decltype(Vec<Acc>{} > Vec<Acc>{});

template <class Acc>
struct PlaceBytes {
  typedef uint8_t Vector __attribute__((vector_size(Lanes<Acc>::count)));
};

// A conversion by more than a factor of two at a time would be compiled lane by lane.
template <class Acc>
CEIT_INLINE void store_places(uint8_t* to, Places<Acc> places, int n) {
  const auto words = __builtin_convertvector(places, typename Lanes<Acc>::Ints);
  const auto halves = __builtin_convertvector(words, typename Lanes<Acc>::Halves);
  const auto bytes = __builtin_convertvector(halves, typename PlaceBytes<Acc>::Vector);
  std::memcpy(to, &bytes, n < Lanes<Acc>::count ? size_t(n) : sizeof bytes);
}

template <class Acc>
CEIT_INLINE Places<Acc> load_places(const uint8_t* from, int n) {
  typename PlaceBytes<Acc>::Vector bytes = {};
  std::memcpy(&bytes, from, n < Lanes<Acc>::count ? size_t(n) : sizeof bytes);
  const auto halves = __builtin_convertvector(bytes, typename Lanes<Acc>::Halves);
  const auto words = __builtin_convertvector(halves, typename Lanes<Acc>::Ints);
  return __builtin_convertvector(words, Places<Acc>);
}

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::i2t_cpu
