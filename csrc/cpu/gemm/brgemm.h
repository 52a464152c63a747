// oneDNN's brgemm as PyTorch carries it: it multiplies what is in cache, on the thread that calls it, and into memory
// that is given to it. With AVX-512 alone, in bfloat16 on processors that multiply it.
#pragma once

#include "../scalar.h"
#include "../tile.h"
#include "epilogue.h"

namespace ceit::gemm {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

// Terms of a sum before it is added to the result: long sums lose no digits (1,536 terms one after another are 2.8
// times as wrong as MKL's sums), and so many rows of B stay in cache.
constexpr int64_t kChunk = 192;

// Whether brgemm packs a B of a depth and serves a call, and what then takes the place of the functions of these names.
template <class T>
struct Brgemm {
  static bool packs(int64_t) { return false; }
  template <class Out>
  static bool serves(const Call<T, Out>&) {
    return false;
  }
  template <class Out>
  static void multiply(const Call<T, Out>&, Range, Range) {}
  static void pack(const Weight<T>&, Range, void*) {}
};

#if defined(__AVX512F__)

// at::native::cpublas::brgemm: C = A B, or C += A B, and what gives back the matrix unit that it may have taken. Not
// there in every PyTorch.
extern "C" __attribute__((weak)) void ceit_brgemm(
    int64_t rows, int64_t columns, int64_t depth, int64_t a_stride, int64_t b_stride, int64_t c_stride, bool add,
    const float* a, const float* b, float* c, bool in_pairs) __asm__("_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb");
extern "C" __attribute__((weak)) void ceit_brgemm_bf16(
    int64_t rows, int64_t columns, int64_t depth, int64_t a_stride, int64_t b_stride, int64_t c_stride, bool add,
    const ceit::Bf16* a, const ceit::Bf16* b, float* c,
    bool in_pairs) __asm__("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb");
extern "C" __attribute__((weak)) void ceit_brgemm_release(bool in_pairs) __asm__(
    "_ZN2at6native7cpublas14brgemm_releaseEb");

namespace {

// Rows that are multiplied at once, at most: their part of the result stays in the first level of cache.
constexpr int64_t kBrgemmRows = 72;

// A tile of the result.
struct Tile {
  int64_t row, rows, column;
  int columns;
};

// Calls body(tile, panel) for tiles of the rows of each panel.
template <class T, class Out, class Body>
void for_tiles(const Call<T, Out>& call, Range rows, Range panels, const Body& body) {
  const int64_t count = rows.end - rows.begin;
  if (count <= 0) return;
  const int64_t height = ceil_div(count, ceil_div(count, kBrgemmRows));
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t column = panel * kPanelColumns;
    const int columns = int(min_of(call.columns - column, kPanelColumns));
    for (int64_t row = rows.begin; row < rows.end; row += height)
      body(Tile{row, min_of(rows.end - row, height), column, columns}, panel);
  }
}

// From the sums, which are `stride` apart, to the result.
template <class T, class Out>
void write_tile(const Call<T, Out>& call, const Tile& tile, const float* sums, int64_t stride) {
  constexpr int lanes = Lanes<float>::count;
  with_activation(call.activation, [&](auto kind) {
    for (int c = 0; c < tile.columns; c += lanes) {
      const Epilogue<decltype(kind)::value, T, Out> epilogue(call, tile.column + c, tile.columns - c);
      for (int64_t r = 0; r < tile.rows; ++r)
        epilogue.write(tile.row + r, load(sums + r * stride + c, tile.columns - c));
    }
  });
}

}  // namespace

template <>
struct Brgemm<float> {
  static bool packs(int64_t) { return ceit_brgemm != nullptr; }
  static bool serves(const Call<float>& call) { return packs(call.depth); }
  static void multiply(const Call<float>& call, Range rows, Range panels) {
    if (rows.end - rows.begin == 1 && !call.b_stride && !call.accumulate) return multiply_row(call, rows.begin, panels);
    const int64_t b_stride = call.b_stride ? call.b_stride : kPanelColumns;
    const int64_t chunks = call.depth ? ceil_div(call.depth, kChunk) : 1;
    for_tiles(call, rows, panels, [&](const Tile& tile, int64_t panel) {
      const float* a = call.a + tile.row * call.a_stride;
      const float* b = static_cast<const float*>(call.b) + panel * kPanelColumns * (call.b_stride ? 1 : call.depth);
      float* out = call.out + tile.row * call.out_stride + tile.column;
      for (int64_t i = 0; i < chunks; ++i) {
        const int64_t first = call.depth * i / chunks, depth = call.depth * (i + 1) / chunks - first;
        ceit_brgemm(tile.rows, tile.columns, depth, call.a_stride, b_stride, call.out_stride, call.accumulate || i > 0,
                    a + first, b + first * b_stride, out, false);
      }
      if (call.activation != Activation::identity || call.scale || call.shift || call.residual)
        write_tile(call, tile, out, call.out_stride);
    });
  }
  static void pack(const Weight<float>& weight, Range panels, void* packed) {
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t column = panel * kPanelColumns, count = min_of(weight.columns - column, kPanelColumns);
      float* to = static_cast<float*>(packed) + column * weight.depth;
      if (count < kPanelColumns) std::memset(to, 0, sizeof(float) * size_t(kPanelColumns * weight.depth));
      if (weight.is_b)
        copy_rows(weight.data + column, weight.columns, weight.depth, count, to);
      else
        transpose(weight.data + column * weight.depth, weight.depth, count, weight.depth, to, kPanelColumns);
    }
  }

 private:
  static void copy_rows(const float* b, int64_t stride, int64_t depth, int64_t columns, float* to) {
    for (int64_t k = 0; k < depth; ++k)
      for_vectors<float>(columns, [&](int64_t c, auto count) {
        store(to + k * kPanelColumns + c, load(b + k * stride + c, count), count);
      });
  }
  // One row with prepacked panels, which come from memory: a classifier's. brgemm reads half as much of them in a
  // second.
  static void multiply_row(const Call<float>& call, int64_t row, Range panels) {
    constexpr int lanes = Lanes<float>::count, vectors = kPanelColumns / lanes, chains = 4;
    constexpr int64_t ahead = 4096 / int64_t(sizeof(float));
    const float* a = call.a + row * call.a_stride;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t column = panel * kPanelColumns;
      const float* b = static_cast<const float*>(call.b) + column * call.depth;
      Vec<float> total[vectors] = {};
      for (int64_t first = 0; first < call.depth; first += kChunk) {
        const int64_t end = min_of(first + kChunk, call.depth);
        Vec<float> sums[chains][vectors] = {};
        int64_t k = first;
        for (; k + chains <= end; k += chains)
#pragma GCC unroll 4
          for (int j = 0; j < chains; ++j)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
              const float* at = b + (k + j) * kPanelColumns + v * lanes;
              __builtin_prefetch(at + ahead, 0, 3);
              sums[j][v] += splat(a[k + j]) * load(at);
            }
        for (; k < end; ++k)
          for (int v = 0; v < vectors; ++v) sums[0][v] += splat(a[k]) * load(b + k * kPanelColumns + v * lanes);
        for (int v = 0; v < vectors; ++v) total[v] += (sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v]);
      }
      alignas(64) float out[kPanelColumns];
      for (int v = 0; v < vectors; ++v) store(out + v * lanes, total[v]);
      write_tile(call, {row, 1, column, int(min_of(call.columns - column, kPanelColumns))}, out, kPanelColumns);
    }
  }
};

template <>
struct Brgemm<Bf16> {
  // Some processors that multiply bfloat16 have less than PyTorch asks for, which it says by throwing.
  static bool available() {
    static const bool does = [] {
      if (!ceit_brgemm_bf16 || !ceit_brgemm_release || !__builtin_cpu_supports("avx512bf16")) return false;
      const Bf16 row[2] = {}, panel[2 * kPanelColumns] = {};
      float out[kPanelColumns];
      try {
        ceit_brgemm_bf16(1, kPanelColumns, 2, 2, kPanelColumns, kPanelColumns, false, row, panel, out, true);
        ceit_brgemm_release(true);
      } catch (...) {
        return false;
      }
      return true;
    }();
    return does;
  }
  static bool packs(int64_t depth) { return depth % 2 == 0 && available(); }
  template <class Out>
  static bool serves(const Call<Bf16, Out>& call) {
    return call.b_stride ? call.depth > 1 && available() : packs(call.depth);
  }
  template <class Out>
  static void multiply(Call<Bf16, Out> call, Range rows, Range panels) {
    alignas(64) float sums[kBrgemmRows * kPanelColumns];
    const int64_t pairs = call.depth / 2;
    const Scratch<Bf16> copy(call.b_stride ? 2 * pairs * kPanelColumns : 0);
    const bool alone = call.activation == Activation::identity && !call.scale && !call.shift && !call.residual;
    if (call.accumulate) call.residual = call.out;
    for_tiles(call, rows, panels, [&](const Tile& tile, int64_t panel) {
      const Bf16* a = call.a + tile.row * call.a_stride;
      const Bf16* b = static_cast<const Bf16*>(call.b) + panel * kPanelColumns * (call.b_stride ? 1 : call.depth);
      if (call.b_stride && tile.row == rows.begin) pack_rows(b, call.b_stride, pairs, tile.columns, copy.get());
      const auto sum = [&](float* to, int64_t stride, bool add) {
        // All columns of the panel, of which those beyond the result's mean nothing.
        ceit_brgemm_bf16(tile.rows, kPanelColumns, 2 * pairs, call.a_stride, kPanelColumns, stride, add, a,
                         call.b_stride ? copy.get() : b, to, true);
        if (call.depth % 2) add_term(tile, a + 2 * pairs, call.a_stride, b + 2 * pairs * call.b_stride, to, stride);
      };
      if constexpr (std::is_same_v<Out, float>)
        if (alone && tile.columns == kPanelColumns)
          return sum(call.out + tile.row * call.out_stride + tile.column, call.out_stride, call.accumulate);
      sum(sums, kPanelColumns, false);
      write_tile(call, tile, sums, kPanelColumns);
    });
    ceit_brgemm_release(true);
  }
  // A panel is (depth / 2, kPanelColumns, 2), two neighbours along the depth side by side: a weight's are so already.
  static void pack(const Weight<Bf16>& weight, Range panels, void* packed) {
    const int64_t pairs = weight.depth / 2;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t column = panel * kPanelColumns, count = min_of(weight.columns - column, kPanelColumns);
      float* to = static_cast<float*>(packed) + column * pairs;
      if (count < kPanelColumns) std::memset(to, 0, sizeof(float) * size_t(kPanelColumns * pairs));
      if (weight.is_b)
        pack_rows(weight.data + column, weight.columns, pairs, int(count), static_cast<Bf16*>(static_cast<void*>(to)));
      else
        transpose(static_cast<const float*>(static_cast<const void*>(weight.data + column * weight.depth)), pairs,
                  count, pairs, to, kPanelColumns);
    }
  }

 private:
  // The panel of rows as they lie.
  static void pack_rows(const Bf16* b, int64_t stride, int64_t pairs, int columns, Bf16* to) {
    using Words = Lanes<float>::Words;
    for (int64_t k = 0; k < pairs; ++k)
      for_vectors<float>(columns, [&](int64_t c, auto count) {
        const auto first = reinterpret_cast<Words>(load(b + 2 * k * stride + c, count));
        const auto words = reinterpret_cast<Words>(load(b + (2 * k + 1) * stride + c, count)) | first >> 16;
        std::memcpy(static_cast<void*>(to + 2 * (k * kPanelColumns + c)), &words, sizeof words);
      });
  }
  // The last of an odd number of terms.
  static void add_term(const Tile& tile, const Bf16* a, int64_t a_stride, const Bf16* b, float* to, int64_t stride) {
    for_vectors<float>(tile.columns, [&](int64_t c, auto count) {
      const auto row = load(b + c, count);
      for (int64_t r = 0; r < tile.rows; ++r) {
        float* at = to + r * stride + c;
        store(at, load(at, count) + value_of(a[r * a_stride]) * row, count);
      }
    });
  }
};

#endif

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::gemm
