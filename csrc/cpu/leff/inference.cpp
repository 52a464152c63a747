#include "inference.h"

#include "../capability.h"
#include "../scalar.h"

namespace ceit::leff {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

namespace {

// Hidden tokens that stay in the second level of cache between the convolution and the GEMM behind it.
constexpr int64_t kRowTileBytes = 640 << 10;

}  // namespace

template <class T>
Inference<T>::Inference(const Sizes& sizes, gemm::Packer<T>& packer) : Sizes(sizes) {
  expanding = packer.weight("weight1", hidden, channels);
  const gemm::Affine<T> norm1 = packer.norm(hidden, eps[0]);
  const int64_t count = int64_t(side) * side;
  Acc* scaled = packer.arena().template take<Acc>(count * hidden);
  const T* kernels = packer.fills() ? packer.whole("weight2", count * hidden) : nullptr;
  const gemm::Affine<T> norm2 = packer.norm(hidden, eps[1]);
  // The depthwise kernels (hidden, side * side), transposed so that neighbouring channels are neighbours in memory,
  // times the scale of the norm behind them.
  for (int64_t tap = 0; kernels && tap < count; ++tap)
    for (int64_t c = 0; c < hidden; ++c) scaled[tap * hidden + c] = value_of(kernels[c * count + tap]) * norm2.scale[c];
  contracting = packer.weight("weight3", outputs, hidden);
  const gemm::Affine<T> norm3 = packer.norm(outputs, eps[2]);
  expanding.scale = norm1.scale, expanding.shift = norm1.shift, expanding.activation = first;
  contracting.scale = norm3.scale, contracting.shift = norm3.shift;
  taps = scaled, shift2 = norm2.shift;
}

template <class T>
void Inference<T>::expand(const T* x, T* memory, int64_t begin, int64_t end) const {
  gemm::Call<T> call = expanding;
  call.a = x + prefix * channels, call.out = memory;
  gemm::multiply(call, begin, end);
}

template <class T>
template <class Out>
void Inference<T>::contract(const Out* x, const Out* residual, T* memory, Out* out, int64_t begin, int64_t end) const {
  const int64_t row_size = int64_t(width) * hidden;
  const int64_t tiles = ceil_div(end - begin, std::max<int64_t>(1, kRowTileBytes / (row_size * int64_t(sizeof(T)))));
  T* activated = memory + tokens() * hidden + begin * row_size;
  DepthwiseCall depthwise{};
  depthwise.shape = {1, tokens(), hidden};
  depthwise.height = height, depthwise.width = width, depthwise.side = side;
  depthwise.in = {memory, tokens()};
  depthwise.first = Activation::identity, depthwise.second = second;
  depthwise.taps = taps, depthwise.bias = shift2;
  auto matmul = gemm::call_of<T, Out>(contracting, activated, nullptr);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    depthwise.top = int(begin + (end - begin) * tile / tiles);
    depthwise.bottom = int(begin + (end - begin) * (tile + 1) / tiles);
    const int64_t count = int64_t(depthwise.bottom - depthwise.top) * width;
    depthwise.out = {activated, count};
    chosen(kIndex<T>).depthwise(depthwise, 0, channel_tiles(depthwise.shape));
    const int64_t at = (prefix + int64_t(depthwise.top) * width) * outputs;
    matmul.out = out + at;
    matmul.residual = residual ? residual + at : nullptr;
    gemm::multiply(matmul, 0, count);
  }
  for (int64_t i = 0; begin == 0 && i < prefix * outputs; ++i) out[i] = residual ? sum_of(x[i], residual[i]) : x[i];
}

#define CEIT_INSTANTIATE(T, Out) \
  template void Inference<T>::contract(const Out*, const Out*, T*, Out*, int64_t, int64_t) const;
template struct Inference<float>;
template struct Inference<Bf16>;
template struct Inference<double>;
CEIT_INSTANTIATE(float, float)
CEIT_INSTANTIATE(Bf16, Bf16)
CEIT_INSTANTIATE(Bf16, float)
CEIT_INSTANTIATE(double, double)

}  // namespace ceit::leff
