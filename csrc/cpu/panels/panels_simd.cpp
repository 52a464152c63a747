// Panel by panel, a few rows at a time. The next panel is not fetched ahead: the processor does, and better.
#include "../activations.h"
#include "calls.h"

// at::native::cpublas::brgemm: C = A B, or C += A B, and what gives back the matrix unit that it may have taken. Not there
// in every PyTorch.
extern "C" __attribute__((weak)) void ceit_brgemm(int64_t rows, int64_t columns, int64_t terms, int64_t a_stride,
                                                  int64_t b_stride, int64_t c_stride, bool add, const float* a,
                                                  const float* b, float* c, bool in_pairs)
    __asm__("_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb");
extern "C" __attribute__((weak)) void ceit_brgemm_bf16(int64_t rows, int64_t columns, int64_t terms, int64_t a_stride,
                                                       int64_t b_stride, int64_t c_stride, bool add,
                                                       const ceit::Bf16* a, const ceit::Bf16* b, float* c,
                                                       bool in_pairs)
    __asm__("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb");
extern "C" __attribute__((weak)) void ceit_brgemm_release(bool in_pairs)
    __asm__("_ZN2at6native7cpublas14brgemm_releaseEb");

namespace ceit::panels {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

namespace {

// Rows that are multiplied at once, at most: their part of the result stays in the first level of cache.
constexpr int64_t kRows = 72;

// A part of a product, at `row` and `column` of the result.
struct Tile {
  int64_t row, rows, column;
  int columns;
};

// From the sums, which are `stride` apart, to the result.
template <Activation kind, class T>
void finish(const Call<T>& call, const Tile& tile, const float* sums, int64_t stride) {
  constexpr int lanes = Lanes<float>::count;
  for (int c = 0; c < tile.columns; c += lanes) {
    const int count = tile.columns - c < lanes ? tile.columns - c : lanes;
    const auto bias = call.bias ? load(call.bias + tile.column + c, count) : splat(0.0f);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t at = (tile.row + r) * call.out_stride + tile.column + c;
      auto value = activate<kind, float>(load(sums + r * stride + c, count) + bias);
      if (call.residual) value += load(call.residual + at, count);
      store(call.out + at, value, count);
    }
  }
}

template <class T>
void finish(const Call<T>& call, const Tile& tile, const float* sums, int64_t stride) {
  with_activation(call.activation, [&](auto kind) { finish<decltype(kind)::value>(call, tile, sums, stride); });
}

void multiply_tile(const Call<float>& call, const Tile& tile, const float* a, const float* b) {
  float* out = call.out + tile.row * call.out_stride + tile.column;
  ceit_brgemm(tile.rows, tile.columns, call.terms, call.a_stride, call.b_stride, call.out_stride, call.add, a, b, out,
              false);
  if (call.activation != Activation::identity || call.bias || call.residual) finish(call, tile, out, call.out_stride);
}

void multiply_tile(const Call<Bf16>& call, const Tile& tile, const Bf16* a, const Bf16* b) {
  alignas(64) float sums[kRows * kColumns];
  // All columns of the panel, of which those beyond the weight are zero.
  ceit_brgemm_bf16(tile.rows, kColumns, call.terms, call.a_stride, call.b_stride, kColumns, false, a, b, sums, true);
  finish(call, tile, sums, kColumns);
}

template <class T>
void multiply(const Call<T>& call, Range rows, Range panels) {
  const int64_t blocks = (rows.end - rows.begin + kRows - 1) / kRows;
  if (blocks <= 0) return;
  const int64_t height = (rows.end - rows.begin + blocks - 1) / blocks;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t column = panel * kColumns;
    const int columns = int(call.columns - column < kColumns ? call.columns - column : kColumns);
    for (int64_t row = rows.begin; row < rows.end; row += height) {
      const int64_t count = rows.end - row < height ? rows.end - row : height;
      multiply_tile(call, {row, count, column, columns}, call.a + row * call.a_stride, call.b + panel * call.b_panel);
    }
  }
}

void multiply_bf16(const Call<Bf16>& call, Range rows, Range panels) {
  multiply(call, rows, panels);
  ceit_brgemm_release(true);
}

}  // namespace

extern const Kernels kernels[1];
const Kernels kernels[1] = {{ceit_brgemm ? multiply<float> : nullptr,
                             ceit_brgemm_bf16 && ceit_brgemm_release ? multiply_bf16 : nullptr}};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::panels
