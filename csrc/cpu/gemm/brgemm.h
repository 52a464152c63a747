// oneDNN's brgemm as PyTorch carries it: it multiplies what is in cache, on the thread that calls it, and into memory
// that is given to it. With AVX-512 alone, in bfloat16 on processors that multiply it.
#pragma once

#include <type_traits>

#include "../activations.h"
#include "../scratch.h"
#include "../tile.h"
#include "calls.h"

namespace ceit::gemm {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

#if !defined(__AVX512F__)

template <class T>
struct Brgemm {
  static bool packs(int64_t) { return false; }
  static bool serves(const Call<T>&) { return false; }
  static void multiply(const Call<T>&, Range, Range) {}
  static void pack(const Weight<T>&, Range, void*) {}
};

#else

// at::native::cpublas::brgemm: C = A B, or C += A B, and what gives back the matrix unit that it may have taken. Not
// there in every PyTorch.
extern "C" __attribute__((weak)) void ceit_brgemm(
    int64_t rows, int64_t columns, int64_t terms, int64_t a_stride, int64_t b_stride, int64_t c_stride, bool add,
    const float* a, const float* b, float* c, bool in_pairs) __asm__("_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb");
extern "C" __attribute__((weak)) void ceit_brgemm_bf16(
    int64_t rows, int64_t columns, int64_t terms, int64_t a_stride, int64_t b_stride, int64_t c_stride, bool add,
    const ceit::Bf16* a, const ceit::Bf16* b, float* c,
    bool in_pairs) __asm__("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb");
extern "C" __attribute__((weak)) void ceit_brgemm_release(bool in_pairs) __asm__(
    "_ZN2at6native7cpublas14brgemm_releaseEb");

namespace {

// Rows that are multiplied at once, at most: their part of the result stays in the first level of cache.
constexpr int64_t kBrgemmRows = 72;

// A part of a product, at `row` and `column` of the result.
struct Part {
  int64_t row, rows, column;
  int columns;
};

// Calls body(part, panel) for parts of the rows of each panel.
template <class T, class Body>
void for_parts(const Call<T>& call, Range rows, Range panels, const Body& body) {
  const int64_t blocks = (rows.end - rows.begin + kBrgemmRows - 1) / kBrgemmRows;
  if (blocks <= 0) return;
  const int64_t height = (rows.end - rows.begin + blocks - 1) / blocks;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t column = panel * kColumns;
    const int columns = int(call.columns - column < kColumns ? call.columns - column : kColumns);
    for (int64_t row = rows.begin; row < rows.end; row += height)
      body(Part{row, rows.end - row < height ? rows.end - row : height, column, columns}, panel);
  }
}

// From the sums, which are `stride` apart, to the result.
template <class T>
void finish(const Call<T>& call, const Part& part, const float* sums, int64_t stride) {
  constexpr int lanes = Lanes<float>::count;
  with_activation(call.activation, [&](auto kind) {
    for (int c = 0; c < part.columns; c += lanes) {
      const int count = part.columns - c < lanes ? part.columns - c : lanes;
      const auto scale = call.scale ? load(call.scale + part.column + c, count) : splat(1.0f);
      const auto shift = call.shift ? load(call.shift + part.column + c, count) : splat(0.0f);
      for (int64_t r = 0; r < part.rows; ++r) {
        const int64_t at = (part.row + r) * call.out_stride + part.column + c;
        auto value = activate<decltype(kind)::value, float>(load(sums + r * stride + c, count) * scale + shift);
        if (call.residual) value += load(call.residual + at, count);
        store(call.out + at, value, count);
      }
    }
  });
}

// Columns of W^T, `together` terms side by side: (terms / together, kColumns, together), zeros beyond the weight's.
template <int together, class T>
void pack_panels(const Weight<T>& weight, Range panels, T* packed) {
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    T* to = packed + panel * kColumns * weight.terms;
    for (int c = 0; c < kColumns; ++c) {
      const int64_t column = panel * kColumns + c;
      const T* from = weight.data + column * weight.terms;
      for (int64_t k = 0; k < weight.terms; ++k)
        to[(k / together * kColumns + c) * together + k % together] = column < weight.columns ? from[k] : T{};
    }
  }
}

}  // namespace

template <class T>
struct Brgemm {
  static bool packs(int64_t) { return false; }
  static bool serves(const Call<T>&) { return false; }
  static void multiply(const Call<T>&, Range, Range) {}
  static void pack(const Weight<T>&, Range, void*) {}
};

template <>
struct Brgemm<float> {
  static bool packs(int64_t) { return ceit_brgemm != nullptr; }
  static bool serves(const Call<float>& call) { return packs(call.terms); }
  static void multiply(const Call<float>& call, Range rows, Range panels) {
    for_parts(call, rows, panels, [&](const Part& part, int64_t panel) {
      const float* b = static_cast<const float*>(call.b) + panel * kColumns * (call.b_stride ? 1 : call.terms);
      float* out = call.out + part.row * call.out_stride + part.column;
      ceit_brgemm(part.rows, part.columns, call.terms, call.a_stride, call.b_stride ? call.b_stride : kColumns,
                  call.out_stride, call.accumulate, call.a + part.row * call.a_stride, b, out, false);
      if (call.activation != Activation::identity || call.scale || call.shift || call.residual)
        finish(call, part, out, call.out_stride);
    });
  }
  static void pack(const Weight<float>& weight, Range panels, void* packed) {
    constexpr int lanes = Lanes<float>::count;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      float* to = static_cast<float*>(packed) + panel * kColumns * weight.terms;
      for (int c = 0; c < kColumns; c += lanes) {
        const int64_t first = panel * kColumns + c;
        for (int64_t k = 0; k < weight.terms; k += lanes) {
          const int count = int(weight.terms - k < lanes ? weight.terms - k : lanes);
          Square<float> square;
          for (int i = 0; i < lanes; ++i)
            square.rows[i] =
                first + i < weight.columns ? load(weight.data + (first + i) * weight.terms + k, count) : splat(0.0f);
          square.transpose();
          for (int j = 0; j < count; ++j) store(to + (k + j) * kColumns + c, square.rows[j]);
        }
      }
    }
  }
};

template <>
struct Brgemm<Bf16> {
  // Some processors that multiply bfloat16 have less than PyTorch asks for, which it says by throwing.
  static bool available() {
    static const bool does = [] {
      if (!ceit_brgemm_bf16 || !ceit_brgemm_release || !__builtin_cpu_supports("avx512bf16")) return false;
      const Bf16 row[2] = {}, panel[2 * kColumns] = {};
      float out[kColumns];
      try {
        ceit_brgemm_bf16(1, kColumns, 2, 2, kColumns, kColumns, false, row, panel, out, true);
        ceit_brgemm_release(true);
      } catch (...) {
        return false;
      }
      return true;
    }();
    return does;
  }
  static bool packs(int64_t terms) { return terms % 2 == 0 && available(); }
  static bool serves(const Call<Bf16>& call) { return call.b_stride == 0 && packs(call.terms); }
  static void multiply(const Call<Bf16>& call, Range rows, Range panels) {
    alignas(64) float sums[kBrgemmRows * kColumns];
    for_parts(call, rows, panels, [&](const Part& part, int64_t panel) {
      // All columns of the panel, of which those beyond the weight are zero.
      ceit_brgemm_bf16(part.rows, kColumns, call.terms, call.a_stride, kColumns, kColumns, false,
                       call.a + part.row * call.a_stride,
                       static_cast<const Bf16*>(call.b) + panel * kColumns * call.terms, sums, true);
      finish(call, part, sums, kColumns);
    });
    ceit_brgemm_release(true);
  }
  static void pack(const Weight<Bf16>& weight, Range panels, void* packed) {
    pack_panels<2>(weight, panels, static_cast<Bf16*>(packed));
  }
};

#endif

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::gemm
