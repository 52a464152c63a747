// oneDNN's brgemm as PyTorch carries it: it multiplies what is in cache, on the thread that calls it, and into memory
// that is given to it. With AVX-512 alone, in bfloat16 on processors that multiply it.
#pragma once

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
      transpose(weight.data + column * weight.depth, weight.depth, count, weight.depth, to, kPanelColumns);
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
    return packs(call.depth);
  }
  template <class Out>
  static void multiply(Call<Bf16, Out> call, Range rows, Range panels) {
    alignas(64) float sums[kBrgemmRows * kPanelColumns];
    const Scratch<Bf16> copy(call.b_stride ? kPanelColumns * call.depth : 0);
    if (call.accumulate) call.residual = call.out;
    for_tiles(call, rows, panels, [&](const Tile& tile, int64_t panel) {
      const Bf16* b = static_cast<const Bf16*>(call.b) + panel * kPanelColumns * (call.b_stride ? 1 : call.depth);
      if (call.b_stride && tile.row == rows.begin) {
        for (int64_t k = 0; k < call.depth; ++k)
          for (int c = 0; c < tile.columns; ++c) copy.get()[place(k, c)] = b[k * call.b_stride + c];
      }
      // All columns of the panel, of which those beyond the result's mean nothing.
      ceit_brgemm_bf16(tile.rows, kPanelColumns, call.depth, call.a_stride, kPanelColumns, kPanelColumns, false,
                       call.a + tile.row * call.a_stride, call.b_stride ? copy.get() : b, sums, true);
      write_tile(call, tile, sums, kPanelColumns);
    });
    ceit_brgemm_release(true);
  }
  // In a panel (depth / 2, kPanelColumns, 2), two neighbours along the depth side by side.
  static int64_t place(int64_t k, int column) { return (k / 2 * kPanelColumns + column) * 2 + k % 2; }
  static void pack(const Weight<Bf16>& weight, Range panels, void* packed) {
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      Bf16* to = static_cast<Bf16*>(packed) + panel * kPanelColumns * weight.depth;
      for (int c = 0; c < kPanelColumns; ++c) {
        const int64_t column = panel * kPanelColumns + c;
        const Bf16* from = weight.data + column * weight.depth;
        for (int64_t k = 0; k < weight.depth; ++k) to[place(k, c)] = column < weight.columns ? from[k] : Bf16{};
      }
    }
  }
};

#endif

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::gemm
