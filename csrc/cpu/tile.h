// Small matrices in cache: the microkernel that multiplies them by tiles that stay in registers, and their
// transposition.
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
constexpr int64_t kDepthChunk = 128;

// Elements from one row to the next of a matrix whose columns are multiplied in vectors: rows that lie a power of two
// apart would share few sets of the cache.
template <class Acc>
CEIT_INLINE int64_t row_stride(int64_t columns) {
  const int64_t vectors = ceil_div(columns, Lanes<Acc>::count);
  return (vectors > 4 ? vectors | 1 : vectors) * Lanes<Acc>::count;
}

// A matrix whose element (i, k) is at data[i * row + k * term].
template <class Acc>
struct Left {
  const Acc* data;
  int64_t row, term;
};

// A matrix of `columns` columns, padded to whole vectors.
template <class Acc>
struct Matrix {
  Acc* data;
  int64_t stride;
};

// A term of a sum: one product.
template <class Acc>
struct Single {
  static CEIT_INLINE Vec<Acc> splat(const Acc* from) { return CEIT_CAPABILITY::splat(*from); }
  static CEIT_INLINE Vec<Acc> add(Vec<Acc> sum, Vec<Acc> a, Vec<Acc> b) { return sum + a * b; }
  CEIT_INLINE Vec<Acc> finish(Vec<Acc> sum) const { return sum; }
};

#if defined(__AVX512BF16__)
// A term of a sum: two products of 16 bits, which lie side by side where a number of 32 does elsewhere. The sum counts
// so often.
struct Pair {
  float factor = 1;
  static CEIT_INLINE Vec<float> splat(const float* from) {
    int32_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return Vec<float>(_mm512_set1_epi32(bits));
  }
  static CEIT_INLINE Vec<float> add(Vec<float> sum, Vec<float> a, Vec<float> b) {
    return Vec<float>(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
  }
  CEIT_INLINE Vec<float> finish(Vec<float> sum) const { return factor * sum; }
};
#endif

template <int vectors, class Acc, class Term>
__attribute__((noinline)) void multiply_panel(Left<Acc> a, Matrix<const Acc> b, Matrix<Acc> c, int64_t rows,
                                              int64_t depth, bool add, Term term) {
  constexpr int lanes = Lanes<Acc>::count, height = kTileRows[vectors];
  for (int64_t i = 0; i < rows; i += height) {
    Vec<Acc> sums[height][vectors];
#pragma GCC unroll 12
    for (int r = 0; r < height; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] = splat(Acc(0));
    const Acc* left = a.data + i * a.row;
    const Acc* right = b.data;
    for (int64_t k = 0; k < depth; ++k) {
      Vec<Acc> row[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) row[v] = load(right + v * lanes);
#pragma GCC unroll 12
      for (int r = 0; r < height; ++r) {
        const auto factor = Term::splat(left + r * a.row);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[r][v] = Term::add(sums[r][v], factor, row[v]);
      }
      left += a.term;
      right += b.stride;
    }
#pragma GCC unroll 12
    for (int r = 0; r < height; ++r) {
      Acc* to = c.data + (i + r) * c.stride;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const auto sum = term.finish(sums[r][v]);
        store(to + v * lanes, add ? load(to + v * lanes) + sum : sum);
      }
    }
  }
}

// C = A B, or C += A B, for A (rows, depth) and B (depth, columns). Columns are rounded up to whole vectors and rows to
// a multiple of kRowMultiple at most: what lies there is read and written, and means nothing.
template <class Acc, class Term = Single<Acc>>
void multiply(Left<Acc> a, Matrix<const Acc> b, Matrix<Acc> c, int64_t rows, int64_t depth, int64_t columns, bool add,
              Term term = {}) {
  constexpr int lanes = Lanes<Acc>::count;
  const int64_t vectors = ceil_div(columns, lanes), panels = ceil_div(vectors, kTileVectors);
  const int64_t parts = ceil_div(depth, kDepthChunk);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = depth * part / parts, count = depth * (part + 1) / parts - first;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t start = vectors * panel / panels, width = vectors * (panel + 1) / panels - start;
      const Left<Acc> left{a.data + first * a.term, a.row, a.term};
      const Matrix<const Acc> right{b.data + first * b.stride + start * lanes, b.stride};
      const Matrix<Acc> to{c.data + start * lanes, c.stride};
      const bool adds = add || part > 0;
      if (width == 1) multiply_panel<1>(left, right, to, rows, count, adds, term);
      if (width == 2) multiply_panel<2>(left, right, to, rows, count, adds, term);
#if defined(__AVX512F__)
      if (width == 3) multiply_panel<3>(left, right, to, rows, count, adds, term);
      if (width == 4) multiply_panel<4>(left, right, to, rows, count, adds, term);
#endif
    }
  }
}

// A square of vectors, transposed.
template <class Acc>
struct Square {
  static constexpr int side = Lanes<Acc>::count;
  Vec<Acc> rows[side];
  CEIT_INLINE void transpose() {
    Acc from[side][side], to[side][side];
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

// to[c * to_stride + r] = from[r * from_stride + c] for rows r and columns c.
template <class From, class To>
CEIT_INLINE void transpose(const From* from, int64_t from_stride, int64_t rows, int64_t columns, To* to,
                           int64_t to_stride) {
  using Acc = acc_t<From>;
  for_vectors<Acc>(rows, [&](int64_t r, auto height) {
    for_vectors<Acc>(columns, [&](int64_t c, auto width) {
      Square<Acc> square;
      for (int i = 0; i < Lanes<Acc>::count; ++i)
        square.rows[i] = i < height ? load(from + (r + i) * from_stride + c, width) : splat(Acc(0));
      square.transpose();
      for (int j = 0; j < width; ++j) store(to + (c + j) * to_stride + r, square.rows[j], height);
    });
  });
}

}  // namespace CEIT_CAPABILITY
}  // namespace ceit
