// Products of small matrices in cache, by tiles that stay in registers.
#pragma once

#include "vector.h"

namespace ceit {
namespace CEIT_CAPABILITY {

// Columns of a tile, in vectors, and the rows that leave registers for them and for an operand.
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
constexpr int kTileRows[] = {0, 12, 12, 8, 6};
#else
constexpr int kTileVectors = 2;
constexpr int kTileRows[] = {0, 12, 6};
#endif
// A multiple of every tile's rows.
constexpr int kRowMultiple = 24;
// Terms of a sum before it is added to the result, so that long sums lose no digits and the panel of B stays in cache.
constexpr int64_t kTerms = 128;

CEIT_INLINE int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// Elements from one row to the next of a matrix whose columns are multiplied in vectors: rows that lie a power of two
// apart would share few sets of the cache.
template <class Real>
CEIT_INLINE int64_t row_stride(int64_t columns) {
  const int64_t vectors = (columns + Lanes<Real>::count - 1) / Lanes<Real>::count;
  return (vectors > 4 ? vectors | 1 : vectors) * Lanes<Real>::count;
}

// A matrix whose element (i, k) is at data[i * row + k * term].
template <class Real>
struct Left {
  const Real* data;
  int64_t row, term;
};

// A matrix of `columns` columns, padded to whole vectors.
template <class Real>
struct Matrix {
  Real* data;
  int64_t stride;
};

template <int vectors, class Real>
__attribute__((noinline)) void multiply_panel(Left<Real> a, Matrix<const Real> b, Matrix<Real> c, int64_t rows,
                                              int64_t terms, bool add) {
  constexpr int lanes = Lanes<Real>::count, height = kTileRows[vectors];
  for (int64_t i = 0; i < rows; i += height) {
    Vec<Real> sums[height][vectors];
#pragma GCC unroll 12
    for (int r = 0; r < height; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] = splat(Real(0));
    const Real* left = a.data + i * a.row;
    const Real* right = b.data;
    for (int64_t k = 0; k < terms; ++k) {
      Vec<Real> row[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) row[v] = load(right + v * lanes);
#pragma GCC unroll 12
      for (int r = 0; r < height; ++r) {
        const auto factor = splat(left[r * a.row]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[r][v] += factor * row[v];
      }
      left += a.term;
      right += b.stride;
    }
#pragma GCC unroll 12
    for (int r = 0; r < height; ++r) {
      Real* to = c.data + (i + r) * c.stride;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) store(to + v * lanes, add ? load(to + v * lanes) + sums[r][v] : sums[r][v]);
    }
  }
}

// C = A B, or C += A B, for A (rows, terms) and B (terms, columns). Columns are rounded up to whole vectors and rows to
// a multiple of kRowMultiple at most: what lies there is read and written, and means nothing.
template <class Real>
void multiply(Left<Real> a, Matrix<const Real> b, Matrix<Real> c, int64_t rows, int64_t terms, int64_t columns,
              bool add) {
  constexpr int lanes = Lanes<Real>::count;
  const int64_t vectors = (columns + lanes - 1) / lanes, panels = (vectors + kTileVectors - 1) / kTileVectors;
  const int64_t parts = (terms + kTerms - 1) / kTerms;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = terms * part / parts, count = terms * (part + 1) / parts - first;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t start = vectors * panel / panels, width = vectors * (panel + 1) / panels - start;
      const Left<Real> left{a.data + first * a.term, a.row, a.term};
      const Matrix<const Real> right{b.data + first * b.stride + start * lanes, b.stride};
      const Matrix<Real> to{c.data + start * lanes, c.stride};
      const bool adds = add || part > 0;
      if (width == 1) multiply_panel<1>(left, right, to, rows, count, adds);
      if (width == 2) multiply_panel<2>(left, right, to, rows, count, adds);
#if defined(__AVX512F__)
      if (width == 3) multiply_panel<3>(left, right, to, rows, count, adds);
      if (width == 4) multiply_panel<4>(left, right, to, rows, count, adds);
#endif
    }
  }
}

// A square of vectors, transposed.
template <class Real>
struct Square {
  static constexpr int side = Lanes<Real>::count;
  Vec<Real> rows[side];
  CEIT_INLINE void transpose() {
    Real from[side][side], to[side][side];
    std::memcpy(from, rows, sizeof from);
    for (int i = 0; i < side; ++i)
      for (int j = 0; j < side; ++j) to[j][i] = from[i][j];
    std::memcpy(rows, to, sizeof to);
  }
};
#if defined(__AVX512F__)
template <>
CEIT_INLINE void Square<float>::transpose() {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  // Interleaving the first half of the rows with the second rotates the bits of an element's address by one.
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
    Vec<float> next[side];
#pragma GCC unroll 8
    for (int i = 0; i < side / 2; ++i) {
      const auto a = __m512(rows[i]), b = __m512(rows[i + side / 2]);
      next[2 * i] = Vec<float>(_mm512_permutex2var_ps(a, low, b));
      next[2 * i + 1] = Vec<float>(_mm512_permutex2var_ps(a, high, b));
    }
#pragma GCC unroll 16
    for (int i = 0; i < side; ++i) rows[i] = next[i];
  }
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
template <>
CEIT_INLINE void Square<float>::transpose() {
  __m256 pairs[side], quads[side];
#pragma GCC unroll 4
  for (int i = 0; i < side; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(__m256(rows[i]), __m256(rows[i + 1]));
    pairs[i + 1] = _mm256_unpackhi_ps(__m256(rows[i]), __m256(rows[i + 1]));
  }
#pragma GCC unroll 2
  for (int i = 0; i < side; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < side / 2; ++i) {
    rows[i] = Vec<float>(_mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20));
    rows[i + 4] = Vec<float>(_mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31));
  }
}
#endif

template <class Real>
CEIT_INLINE Real sum_of_lanes(Vec<Real> v) {
  Real sum = 0;
  for (int i = 0; i < Lanes<Real>::count; ++i) sum += v[i];
  return sum;
}
template <class Real>
CEIT_INLINE Real largest_lane(Vec<Real> v) {
  Real largest = v[0];
  for (int i = 1; i < Lanes<Real>::count; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}
#if defined(__AVX512F__)
template <>
CEIT_INLINE float sum_of_lanes<float>(Vec<float> v) {
  return _mm512_reduce_add_ps(__m512(v));
}
template <>
CEIT_INLINE float largest_lane<float>(Vec<float> v) {
  return _mm512_reduce_max_ps(__m512(v));
}
#endif

}  // namespace CEIT_CAPABILITY
}  // namespace ceit
