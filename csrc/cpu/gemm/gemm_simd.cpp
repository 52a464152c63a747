// The GEMM of this project: tiles of the result stay in registers, a part of B in the first level of cache. With
// AVX-512 oneDNN's brgemm takes its place where PyTorch exports it (brgemm.h).
#include "../activations.h"
#include "../tile.h"
#include "brgemm.h"
#include "calls.h"

namespace ceit::gemm {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

namespace {

// A tile in registers, in rows and vectors, beside an operand and the vectors of B.
#if defined(__AVX512F__)
constexpr int kHeight = 12, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kHeight = 6, kVectors = 4;
#else
constexpr int kHeight = 6, kVectors = 2;
#endif
// Terms of a sum before it is added to the result: long sums lose no digits, and so many rows of B stay in cache.
constexpr int64_t kChunk = 192;
// Rows of 16 bits that are widened at a time.
constexpr int64_t kWidened = 8 * kHeight;
// Bytes of the rows that all panels of a packed weight pass by, for they stay in the second level of cache.
constexpr int64_t kBandBytes = 160 << 10;

// Columns of a tile. A packed panel is made of slices (terms, width), one after another.
template <class Real>
constexpr int kWidth = kVectors * Lanes<Real>::count;

template <class Real>
using Sums = Vec<Real>[kHeight][kVectors];

template <int rows, class Real>
CEIT_INLINE void multiply_tile(const Real* a, int64_t a_stride, const Real* b, int64_t terms, Sums<Real>& sums) {
  constexpr int lanes = Lanes<Real>::count;
  Vec<Real> tile[rows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) tile[r][v] = splat(Real(0));
  for (int64_t k = 0; k < terms; ++k) {
    Vec<Real> row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * lanes);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const auto factor = splat(a[r * a_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) tile[r][v] += factor * row[v];
    }
    b += kWidth<Real>;
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = tile[r][v];
}

template <class Real, int rows = kHeight>
void multiply_rows(int count, const Real* a, int64_t a_stride, const Real* b, int64_t terms, Sums<Real>& sums) {
  if constexpr (rows > 1)
    if (count < rows) return multiply_rows<Real, rows - 1>(count, a, a_stride, b, terms, sums);
  multiply_tile<rows>(a, a_stride, b, terms, sums);
}

// Columns `begin` to `begin + count` of a result.
struct Columns {
  int64_t begin;
  int count;
};

// What is added up of a chunk's rows until the last chunk: in the result itself, or beside one of 16 bits.
template <class Real>
struct Partial {
  Real* data;
  int64_t stride;
};

template <Activation kind, class T>
void write_tile(const Call<T>& call, const Sums<RealOf<T>>& sums, int64_t row, int rows, const Columns& columns) {
  using Real = RealOf<T>;
  constexpr int lanes = Lanes<Real>::count;
  for (int v = 0; v < kVectors && v * lanes < columns.count; ++v) {
    const int count = columns.count - v * lanes;
    const int64_t column = columns.begin + v * lanes;
    const auto scale = call.scale ? load(call.scale + column, count) : splat(Real(1));
    const auto shift = call.shift ? load(call.shift + column, count) : splat(Real(0));
    for (int r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * call.out_stride + column;
      auto value = activate<kind, Real>(sums[r][v] * scale + shift);
      if (call.residual) value += load(call.residual + at, count);
      store(call.out + at, value, count);
    }
  }
}

template <class Real>
CEIT_INLINE void add_partial(const Partial<Real>& partial, Sums<Real>& sums, int rows, int columns) {
  constexpr int lanes = Lanes<Real>::count;
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kVectors && v * lanes < columns; ++v)
      sums[r][v] += load(partial.data + r * partial.stride + v * lanes, columns - v * lanes);
}

template <class Real>
CEIT_INLINE void store_partial(const Partial<Real>& partial, const Sums<Real>& sums, int rows, int columns) {
  constexpr int lanes = Lanes<Real>::count;
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kVectors && v * lanes < columns; ++v)
      store(partial.data + r * partial.stride + v * lanes, sums[r][v], columns - v * lanes);
}

// Terms `first` to `first + terms` of some columns of B, and whether they are the first and the last of a sum.
template <class Real>
struct Chunk {
  const Real* b;
  int64_t first, terms;
  bool begins, ends;
};

// Rows of a (from its first term on) with a chunk.
template <class T>
void multiply_chunk(const Call<T>& call, const RealOf<T>* a, int64_t a_stride, Range rows, const Columns& columns,
                    const Chunk<RealOf<T>>& chunk, Partial<RealOf<T>> partial) {
  using Real = RealOf<T>;
  Sums<Real> sums;
  for (int64_t row = rows.begin; row < rows.end; row += kHeight) {
    const int count = int(rows.end - row < kHeight ? rows.end - row : kHeight);
    const int64_t at = row - rows.begin;
    multiply_rows<Real>(count, a + at * a_stride + chunk.first, a_stride, chunk.b, chunk.terms, sums);
    const Partial<Real> here{partial.data + at * partial.stride, partial.stride};
    if (!chunk.begins) add_partial(here, sums, count, columns.count);
    if (!chunk.ends)
      store_partial(here, sums, count, columns.count);
    else
      with_activation(call.activation,
                      [&](auto kind) { write_tile<decltype(kind)::value>(call, sums, row, count, columns); });
  }
}

// Columns of B, in a matrix as it lies, as a slice.
template <class T>
void copy_slice(const T* b, int64_t stride, int64_t terms, int columns, RealOf<T>* slice) {
  using Real = RealOf<T>;
  constexpr int lanes = Lanes<Real>::count;
  for (int64_t k = 0; k < terms; ++k)
    for (int v = 0; v < kVectors; ++v) {
      const int count = columns - v * lanes;
      store(slice + k * kWidth<Real> + v * lanes, count > 0 ? load(b + k * stride + v * lanes, count) : splat(Real(0)));
    }
}

// Some rows of a product with some columns.
template <class T>
void multiply_slice(const Call<T>& call, const RealOf<T>* a, int64_t a_stride, Range rows, const Columns& columns) {
  using Real = RealOf<T>;
  alignas(64) Real copy[kChunk * kWidth<Real>], beside[kWidened * kWidth<Real>];
  const Real* packed = call.b_stride ? nullptr : static_cast<const Real*>(call.b) + columns.begin * call.terms;
  Partial<Real> partial{beside, kWidth<Real>};
  if constexpr (std::is_same_v<T, Real>)
    partial = {call.out + rows.begin * call.out_stride + columns.begin, call.out_stride};
  const int64_t chunks = call.terms ? (call.terms + kChunk - 1) / kChunk : 1;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t first = call.terms * i / chunks, terms = call.terms * (i + 1) / chunks - first;
    const Real* b = packed ? packed + first * kWidth<Real> : copy;
    if (!packed)
      copy_slice(static_cast<const T*>(call.b) + first * call.b_stride + columns.begin, call.b_stride, terms,
                 columns.count, copy);
    const Chunk<Real> chunk{b, first, terms, i == 0 && !call.accumulate, i + 1 == chunks};
    multiply_chunk(call, a, a_stride, rows, columns, chunk, partial);
  }
}

template <class T>
void multiply_band(const Call<T>& call, const RealOf<T>* a, int64_t a_stride, Range rows, Range panels) {
  constexpr int width = kWidth<RealOf<T>>;
  const int64_t last = panels.end * kColumns < call.columns ? panels.end * kColumns : call.columns;
  for (int64_t column = panels.begin * kColumns; column < last; column += width)
    multiply_slice(call, a, a_stride, rows, {column, int(last - column < width ? last - column : width)});
}

CEIT_INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows that stay in cache while a packed weight passes; of one that is not, parts are copied once for all rows.
template <class T>
void multiply_bands(const Call<T>& call, Range rows, Range panels) {
  int64_t band = rows.end - rows.begin;
  if (call.b_stride == 0) {
    const int64_t fitting = kBandBytes / ((call.terms + 1) * int64_t(sizeof(T))) / kHeight * kHeight;
    band = fitting > kHeight ? fitting : kHeight;
  }
  for (int64_t row = rows.begin; row < rows.end; row += band)
    multiply_band(call, call.a + row * call.a_stride, call.a_stride, {row, smaller_of(row + band, rows.end)}, panels);
}

template <class T>
void multiply(const Call<T>& call, Range rows, Range panels) {
  if (Brgemm<T>::serves(call)) return Brgemm<T>::multiply(call, rows, panels);
  multiply_bands(call, rows, panels);
}

void multiply(const Call<Bf16>& call, Range rows, Range panels) {
  if (Brgemm<Bf16>::serves(call)) return Brgemm<Bf16>::multiply(call, rows, panels);
  const Scratch<float> wide(kWidened * call.terms);
  for (int64_t row = rows.begin; row < rows.end; row += kWidened) {
    const Range band{row, smaller_of(row + kWidened, rows.end)};
    constexpr int lanes = Lanes<float>::count;
    for (int64_t r = band.begin; r < band.end; ++r)
      for (int64_t k = 0; k < call.terms; k += lanes) {
        const int count = int(smaller_of(call.terms - k, lanes));
        store(wide.get() + (r - row) * call.terms + k, load(call.a + r * call.a_stride + k, count), count);
      }
    multiply_band<Bf16>(call, wide.get(), call.terms, band, panels);
  }
}

// Columns of W^T as a slice, zeros beyond them.
template <class T>
void pack_slice(const Weight<T>& weight, int64_t column, RealOf<T>* slice) {
  using Real = RealOf<T>;
  constexpr int lanes = Lanes<Real>::count;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first = column + v * lanes;
    for (int64_t k = 0; k < weight.terms; k += lanes) {
      const int count = int(smaller_of(weight.terms - k, lanes));
      Square<Real> square;
      for (int i = 0; i < lanes; ++i)
        square.rows[i] =
            first + i < weight.columns ? load(weight.data + (first + i) * weight.terms + k, count) : splat(Real(0));
      square.transpose();
      for (int j = 0; j < count; ++j) store(slice + (k + j) * kWidth<Real> + v * lanes, square.rows[j]);
    }
  }
}

template <class T>
void pack(const Weight<T>& weight, Range panels, void* packed) {
  using Real = RealOf<T>;
  if (Brgemm<T>::packs(weight.terms)) return Brgemm<T>::pack(weight, panels, packed);
  for (int64_t column = panels.begin * kColumns; column < panels.end * kColumns; column += kWidth<Real>)
    pack_slice(weight, column, static_cast<Real*>(packed) + column * weight.terms);
}

template <class T>
int64_t packed_size(int64_t terms) {
  return Brgemm<T>::packs(terms) ? sizeof(T) : sizeof(RealOf<T>);
}

template <class T>
constexpr Kernels<T> kernels_of() {
  return {multiply, pack<T>, packed_size<T>};
}

}  // namespace

extern const Table table[1];
const Table table[1] = {{kernels_of<float>(), kernels_of<Bf16>(), kernels_of<double>()}};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::gemm
