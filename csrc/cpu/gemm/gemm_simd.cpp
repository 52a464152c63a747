// The GEMM of this project: tiles of the result stay in registers, a part of B in the first level of cache. With
// AVX-512 oneDNN's brgemm takes its place where PyTorch exports it (brgemm.h).
#include "brgemm.h"

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
// Rows of 16 bits that are converted at a time: all panels of a prepacked B pass by them, while one that is read as it
// lies is copied for each.
constexpr int64_t kConverted = 8 * kHeight, kConvertedUnpacked = 4 * kConverted;
// Bytes of the rows that all panels of a prepacked B pass by, for they stay in the second level of cache.
constexpr int64_t kRowTileBytes = 160 << 10;

// Columns of a tile. A prepacked panel is made of slices (depth, width), one after another.
template <class Acc>
constexpr int kWidth = kVectors * Lanes<Acc>::count;

template <class Acc>
using Sums = Vec<Acc>[kHeight][kVectors];

template <int rows, class Acc>
CEIT_INLINE void multiply_tile(const Acc* a, int64_t a_stride, const Acc* b, int64_t depth, Sums<Acc>& sums) {
  constexpr int lanes = Lanes<Acc>::count;
  Vec<Acc> tile[rows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) tile[r][v] = splat(Acc(0));
  for (int64_t k = 0; k < depth; ++k) {
    Vec<Acc> row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * lanes);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const auto factor = splat(a[r * a_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) tile[r][v] += factor * row[v];
    }
    b += kWidth<Acc>;
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = tile[r][v];
}

template <class Acc, int rows = kHeight>
void multiply_rows(int count, const Acc* a, int64_t a_stride, const Acc* b, int64_t depth, Sums<Acc>& sums) {
  if constexpr (rows > 1)
    if (count < rows) return multiply_rows<Acc, rows - 1>(count, a, a_stride, b, depth, sums);
  multiply_tile<rows>(a, a_stride, b, depth, sums);
}

// What is added up of a chunk's rows until the last chunk: in the result itself, or beside one of 16 bits.
template <class Acc>
struct Partial {
  Acc* data;
  int64_t stride;
};

// A sum with what was added up before, if anything was.
template <class Acc, class Width>
CEIT_INLINE Vec<Acc> sum_with(const Partial<Acc>* before, Vec<Acc> sum, int row, int at, Width columns) {
  return before ? sum + load(before->data + row * before->stride + at, columns - at) : sum;
}

template <Activation kind, class T, class Out, class Width>
CEIT_INLINE void write_tile(const Call<T, Out>& call, const Sums<acc_t<T>>& sums, const Partial<acc_t<T>>* before,
                            int64_t row, int rows, int64_t column, Width columns) {
  constexpr int lanes = Lanes<acc_t<T>>::count;
  for (int v = 0; v < kVectors && v * lanes < columns; ++v) {
    const Epilogue<kind, T, Out> epilogue(call, column + v * lanes, columns - v * lanes);
    for (int r = 0; r < rows; ++r) epilogue.write(row + r, sum_with(before, sums[r][v], r, v * lanes, columns));
  }
}

template <class Acc, class Width>
CEIT_INLINE void store_partial(const Partial<Acc>& to, const Sums<Acc>& sums, const Partial<Acc>* before, int rows,
                               Width columns) {
  constexpr int lanes = Lanes<Acc>::count;
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kVectors && v * lanes < columns; ++v)
      store(to.data + r * to.stride + v * lanes, sum_with(before, sums[r][v], r, v * lanes, columns),
            columns - v * lanes);
}

// Lines of the cache, so many bytes apart.
struct Lines {
  const void* start = nullptr;
  int count = 0;
  int64_t stride = 64;
  CEIT_INLINE void prefetch(int begin, int end) const {
    for (int i = begin; i < end; ++i) __builtin_prefetch(static_cast<const char*>(start) + i * stride, 0, 2);
  }
};

// Terms `first` to `first + depth` of some columns of B, whether they are the first and the last of a sum, and what of
// B comes next.
template <class Acc>
struct Chunk {
  const Acc* b;
  int64_t first, depth;
  bool begins, ends;
  Lines next;
};

// The shares of a whole in so many parts, the larger ones first: a division for each part costs a hundredth of a GEMM.
class Shares {
 public:
  CEIT_INLINE Shares(int whole, int parts) : share_(whole / parts), larger_(whole % parts) {}
  CEIT_INLINE int next() { return share_ + (larger_-- > 0); }

 private:
  int share_, larger_;
};

// Rows of a (from its first term on) with a chunk, in tiles of one height or one row less.
template <class T, class Out, class Width>
void multiply_chunk(const Call<T, Out>& call, const acc_t<T>* a, int64_t a_stride, Range rows, int64_t column,
                    Width columns, const Chunk<acc_t<T>>& chunk, Partial<acc_t<T>> partial) {
  using Acc = acc_t<T>;
  Sums<Acc> sums;
  const int all = int(rows.end - rows.begin), tiles = int(ceil_div(all, kHeight));
  // Of the rows, and of what comes next, which would stall the core if all were asked for at once.
  Shares heights(all, tiles), lines(chunk.next.count, tiles);
  for (int at = 0, line = 0; at < all;) {
    const int count = heights.next(), asked = lines.next();
    const int64_t row = rows.begin + at;
    const Partial<Acc> here{partial.data + at * partial.stride, partial.stride};
    chunk.next.prefetch(line, line + asked);
    for (int r = 0; r < count; ++r) __builtin_prefetch(here.data + r * here.stride, 1, 3);
    multiply_rows<Acc>(count, a + at * a_stride + chunk.first, a_stride, chunk.b, chunk.depth, sums);
    const auto* before = chunk.begins ? nullptr : &here;
    if (!chunk.ends)
      store_partial(here, sums, before, count, columns);
    else
      with_activation(call.activation, [&](auto kind) {
        write_tile<decltype(kind)::value>(call, sums, before, row, count, column, columns);
      });
    at += count, line += asked;
  }
}

// Columns of B, in a matrix as it lies, as a slice.
template <class T>
void copy_slice(const T* b, int64_t stride, int64_t depth, int columns, acc_t<T>* slice) {
  using Acc = acc_t<T>;
  constexpr int lanes = Lanes<Acc>::count;
  for (int64_t k = 0; k < depth; ++k)
    for (int v = 0; v < kVectors; ++v) {
      const int count = columns - v * lanes;
      store(slice + k * kWidth<Acc> + v * lanes, count > 0 ? load(b + k * stride + v * lanes, count) : splat(Acc(0)));
    }
}

// Some rows and columns of a result: every chunk of the rows, which is in cache, with all columns of B. Sums are kept
// in the result meanwhile; where that has 16 bits, beside it and a slice of columns at a time.
template <class T, class Out>
void multiply_row_tile(const Call<T, Out>& call, const acc_t<T>* a, int64_t a_stride, Range rows, Range panels) {
  using Acc = acc_t<T>;
  constexpr int width = kWidth<Acc>;
  constexpr bool in_result = std::is_same_v<Out, Acc>;
  alignas(64) Acc copy[kChunk * width], beside[in_result ? 1 : kConvertedUnpacked * width];
  const int64_t chunks = call.depth ? ceil_div(call.depth, kChunk) : 1;
  const Range all{panels.begin * kPanelColumns, min_of(panels.end * kPanelColumns, call.columns)};
  const int64_t step = in_result ? all.end - all.begin : width;
  for (int64_t start = all.begin; start < all.end; start += step) {
    const int64_t end = min_of(start + step, all.end);
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t first = call.depth * i / chunks, depth = call.depth * (i + 1) / chunks - first;
      for (int64_t column = start; column < end; column += width) {
        const int columns = int(min_of(end - column, width));
        const Acc* packed = static_cast<const Acc*>(call.b) + column * call.depth + first * width;
        const T* lying = static_cast<const T*>(call.b) + first * call.b_stride + column;
        Chunk<Acc> chunk{packed, first, depth, i == 0 && !call.accumulate, i + 1 == chunks, {}};
        if (call.b_stride) {
          copy_slice(lying, call.b_stride, depth, columns, copy);
          chunk.b = copy;
        }
        if (column + width < end) {
          if (call.b_stride)
            chunk.next = {lying + width, int(depth), call.b_stride * int64_t(sizeof(T))};
          else
            chunk.next = {packed + width * call.depth, int(width * depth * sizeof(Acc) / 64)};
        }
        Partial<Acc> partial{beside, width};
        if constexpr (in_result) partial = {call.out + rows.begin * call.out_stride + column, call.out_stride};
        if (columns == width)
          multiply_chunk(call, a, a_stride, rows, column, Count<width>(), chunk, partial);
        else
          multiply_chunk(call, a, a_stride, rows, column, columns, chunk, partial);
      }
    }
  }
}

// Tiles of rows that stay in cache while a prepacked B passes; of one that is not, parts are copied once for all rows.
template <class T, class Out>
void multiply(const Call<T, Out>& call, Range rows, Range panels) {
  if (Brgemm<T>::serves(call)) return Brgemm<T>::multiply(call, rows, panels);
  int64_t height = rows.end - rows.begin;
  if (call.b_stride == 0) {
    const int64_t chunk = min_of(call.depth + 1, kChunk);
    height = ceil_div(height, ceil_div(height * chunk * int64_t(sizeof(T)), kRowTileBytes));
  }
  for (int64_t row = rows.begin; row < rows.end; row += height)
    multiply_row_tile(call, call.a + row * call.a_stride, call.a_stride, {row, min_of(row + height, rows.end)}, panels);
}

template <class Out>
void multiply(const Call<Bf16, Out>& call, Range rows, Range panels) {
  if (Brgemm<Bf16>::serves(call)) return Brgemm<Bf16>::multiply(call, rows, panels);
  constexpr int lanes = Lanes<float>::count;
  const int64_t height = min_of(rows.end - rows.begin, call.b_stride ? kConvertedUnpacked : kConverted);
  const Scratch<float> converted(height * call.depth);
  for (int64_t row = rows.begin; row < rows.end; row += height) {
    const Range tile{row, min_of(row + height, rows.end)};
    for (int64_t r = tile.begin; r < tile.end; ++r)
      for (int64_t k = 0; k < call.depth; k += lanes) {
        const int count = int(min_of(call.depth - k, lanes));
        store(converted.get() + (r - row) * call.depth + k, load(call.a + r * call.a_stride + k, count), count);
      }
    multiply_row_tile(call, converted.get(), call.depth, tile, panels);
  }
}

template <class T>
void pack(const Weight<T>& weight, Range panels, void* packed) {
  using Acc = acc_t<T>;
  if (Brgemm<T>::packs(weight.depth)) return Brgemm<T>::pack(weight, panels, packed);
  for (int64_t column = panels.begin * kPanelColumns; column < panels.end * kPanelColumns; column += kWidth<Acc>) {
    Acc* slice = static_cast<Acc*>(packed) + column * weight.depth;
    const int64_t count = min_of(weight.columns - column, kWidth<Acc>);
    if (weight.is_b) {
      copy_slice(weight.data + column, weight.columns, weight.depth, int(count), slice);
      continue;
    }
    if (count < kWidth<Acc>) std::memset(slice, 0, sizeof(Acc) * size_t(kWidth<Acc> * weight.depth));
    transpose(weight.data + column * weight.depth, weight.depth, count, weight.depth, slice, kWidth<Acc>);
  }
}

template <class T>
int64_t packed_size(int64_t depth) {
  return Brgemm<T>::packs(depth) ? sizeof(T) : sizeof(acc_t<T>);
}

template <class T>
void transpose_rows(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out, int64_t out_stride) {
  transpose(in, in_stride, rows, columns, out, out_stride);
}

template <class T>
constexpr Kernels<T> kernels_of() {
  return {multiply, multiply, pack<T>, packed_size<T>, transpose_rows<T>};
}

}  // namespace

extern const Table table[1] = {{kernels_of<float>(), kernels_of<Bf16>(), kernels_of<double>()}};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::gemm
