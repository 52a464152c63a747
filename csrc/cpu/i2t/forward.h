// The stem's forward pass: a row of the result at a time, from rows of the convolution that stay in cache.
#pragma once

#include "rows.h"

namespace ceit::i2t_cpu {
namespace CEIT_CAPABILITY {
namespace {

// Mean and centred sum of squares of each channel of a row. The mean is taken about the first pixel, so that one far
// from zero costs no digits, and what is left about it is added, so that one near zero has them.
template <class Acc>
void write_moments(const Acc* row, int64_t stride, const Sizes& s, Acc* moments) {
  const int64_t width = s.conv_width;
  for_vectors<Acc>(s.out_channels, [&](int64_t c, auto n) {
    const auto first = load(row + c);
    auto sum = splat(Acc(0)), squares = splat(Acc(0)), left = splat(Acc(0));
    for (int64_t x = 1; x < width; ++x) sum += load(row + x * stride + c) - first;
    const auto mean = first + sum / Acc(width);
    for (int64_t x = 0; x < width; ++x) {
      const auto centred = load(row + x * stride + c) - mean;
      squares += centred * centred;
      left += centred;
    }
    store(moments + c, mean + left / Acc(width), n);
    store(moments + s.out_channels + c, squares, n);
  });
}

// The positions of a window that lie within a size.
struct Inside {
  int first, last;
  CEIT_INLINE Inside(int64_t pooled, int64_t size)
      : first(pooled > 0 ? 0 : 1), last(2 * pooled + 1 < size ? 2 : int(size - 2 * pooled)) {}
  CEIT_INLINE bool whole() const { return first == 0 && last == 2; }
};

// The largest of a window's values, and its place.
template <class Acc>
struct Largest {
  Vec<Acc> value;
  Places<Acc> place;
};

// Of any window; what is no number stays. `rows` start at the window's first column.
template <class Acc>
CEIT_INLINE Largest<Acc> largest_inside(const Acc* const (&rows)[3], int64_t stride, Vec<Acc> sign, Inside down,
                                        Inside across) {
  Largest<Acc> result = {splat(-Acc(INFINITY)), Places<Acc>{} + (3 * down.first + across.first)};
  for (int i = down.first; i <= down.last; ++i) {
    for (int j = across.first; j <= across.last; ++j) {
      const auto next = load(rows[i] + j * stride) * sign;
      const auto better = (next > result.value) | (next != next);
      result.value = better ? next : result.value;
      result.place = better ? Places<Acc>{} + (3 * i + j) : result.place;
    }
  }
  return result;
}

// Of a whole window of finite numbers, without a chain of comparisons.
template <class Acc>
CEIT_INLINE Largest<Acc> largest_of_nine(const Acc* const (&rows)[3], int64_t stride, Vec<Acc> sign, bool place) {
  Vec<Acc> values[3][3];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) values[i][j] = load(rows[i] + j * stride) * sign;
  }
  Vec<Acc> across[3];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) across[i] = larger<Acc>(larger<Acc>(values[i][0], values[i][1]), values[i][2]);
  Largest<Acc> result = {larger<Acc>(larger<Acc>(across[0], across[1]), across[2]), {}};
  if (place) {
#pragma GCC unroll 9
    for (int i = 8; i >= 0; --i) result.place = values[i / 3][i % 3] == result.value ? Places<Acc>{} + i : result.place;
  }
  return result;
}

template <class T, class Acc = acc_t<T>>
void pool_row(const ForwardCall& call, const Acc* const (&rows)[3], Inside down, bool finite, int64_t stride, T* out,
              uint8_t* places) {
  const Sizes& s = call.convolution.sizes;
  for_vectors<Acc>(s.out_channels, [&](int64_t c, auto n) {
    const auto sign = load(static_cast<const Acc*>(call.sign) + c, n);
    const auto norm = call.norm ? Norm<Acc>(call.norm, s.out_channels, c, n) : Norm<Acc>();
    for (int64_t x = 0; x < s.pooled_width; ++x) {
      const Acc* at[3];
      for (int i = 0; i < 3; ++i) at[i] = rows[i] + (2 * x - 1) * stride + c;
      const Inside across(x, s.conv_width);
      const auto largest = finite && down.whole() && across.whole()
                               ? largest_of_nine<Acc>(at, stride, sign, places != nullptr)
                               : largest_inside<Acc>(at, stride, sign, down, across);
      // Where gamma is zero, so are sign, value and scale: the result is the shift.
      store(out + x * s.out_channels + c, norm(largest.value * sign), n);
      if (places) store_places<Acc>(places + x * s.out_channels + c, largest.place, n);
    }
  });
}

}  // namespace

template <class T>
void forward(const ForwardCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const Sizes& s = call.convolution.sizes;
  ConvolvedRows<T> convolved(call.convolution, call.moments != nullptr);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / s.pooled_height, y = task % s.pooled_height;
    const Inside down(y, s.conv_height);
    const Acc* rows[3];
    for (auto& row : rows) row = convolved.row(image, 2 * y);
    bool finite = true;
    for (int i = down.first; i <= down.last; ++i) {
      const int64_t row = 2 * y - 1 + i;
      rows[i] = convolved.row(image, row);
      finite = finite && convolved.is_finite(row);
      // The first is the row's above too.
      if (call.moments && i > 0)
        write_moments(rows[i], convolved.stride(), s,
                      static_cast<Acc*>(call.moments) + (image * s.conv_height + row) * 2 * s.out_channels);
    }
    const int64_t at = task * s.pooled_width * s.out_channels;
    T* out = static_cast<T*>(call.out) + at;
    pool_row<T>(call, rows, down, finite, convolved.stride(), out, call.indices ? call.indices + at : nullptr);
  }
}

template <class T>
void normalise(const NormaliseCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const T* x = static_cast<const T*>(call.x);
  T* out = static_cast<T*>(call.out);
  for_vectors<Acc>(call.channels, [&](int64_t c, auto n) {
    const Norm<Acc> norm(call.norm, call.channels, c, n);
    for (int64_t at = begin * call.channels + c; at < end * call.channels; at += call.channels)
      store(out + at, norm(load(x + at, n)), n);
  });
}

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::i2t_cpu
