// Panel by panel, a few rows at a time. The next panel is not fetched ahead: the processor does, and better.
#include "../activations.h"
#include "calls.h"

// at::native::cpublas::brgemm of float32: C = A B, or C += A B. Not there in every PyTorch.
extern "C" __attribute__((weak)) void ceit_brgemm(int64_t rows, int64_t columns, int64_t terms, int64_t a_stride,
                                                  int64_t b_stride, int64_t c_stride, bool add, const float* a,
                                                  const float* b, float* c, bool is_vnni)
    __asm__("_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb");

namespace ceit::panels {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

namespace {

// Rows that are multiplied at once, at most: their part of the result stays in the first level of cache.
constexpr int64_t kRows = 72;

template <Activation kind>
void finish(const Call& call, int64_t row, int64_t rows, int64_t column, int columns) {
  constexpr int lanes = Lanes<float>::count;
  for (int c = 0; c < columns; c += lanes) {
    const int count = columns - c < lanes ? columns - c : lanes;
    const auto bias = call.bias ? load(call.bias + column + c, count) : splat(0.0f);
    for (int64_t r = row; r < row + rows; ++r) {
      const int64_t at = r * call.out_stride + column + c;
      auto value = activate<kind, float>(load(call.out + at, count) + bias);
      if (call.residual) value += load(call.residual + at, count);
      store(call.out + at, value, count);
    }
  }
}

void multiply(const Call& call, Range rows, Range panels) {
  const int64_t blocks = (rows.end - rows.begin + kRows - 1) / kRows;
  if (blocks <= 0) return;
  const int64_t height = (rows.end - rows.begin + blocks - 1) / blocks;
  const bool plain = call.activation == Activation::identity && !call.bias && !call.residual;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t column = panel * kColumns;
    const int columns = int(call.columns - column < kColumns ? call.columns - column : kColumns);
    for (int64_t row = rows.begin; row < rows.end; row += height) {
      const int64_t count = rows.end - row < height ? rows.end - row : height;
      ceit_brgemm(count, columns, call.terms, call.a_stride, call.b_stride, call.out_stride, call.add,
                  call.a + row * call.a_stride, call.b + panel * call.b_panel,
                  call.out + row * call.out_stride + column, false);
      if (!plain)
        with_activation(call.activation,
                        [&](auto kind) { finish<decltype(kind)::value>(call, row, count, column, columns); });
    }
  }
}

}  // namespace

extern const Kernels kernels[1];
const Kernels kernels[1] = {{ceit_brgemm ? multiply : nullptr}};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::panels
