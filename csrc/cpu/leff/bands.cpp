#include "bands.h"

#include "../capability.h"
#include "../scalar.h"

namespace ceit::leff {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

namespace {

// Hidden tokens that stay in the second level of cache between the convolution and the product behind it.
constexpr int64_t kBandBytes = 640 << 10;

// The depthwise kernels (channels, side * side) as (side * side, channels), so that neighbouring channels are
// neighbours in memory, times the scale of the norm behind them.
template <class T>
void scale_taps(const T* kernels, const AccOf<T>* scale, int64_t channels, int64_t taps, AccOf<T>* to) {
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < channels; ++c) to[tap * channels + c] = value_of(kernels[c * taps + tap]) * scale[c];
}

}  // namespace

template <class T>
Bands<T>::Bands(const Sizes& sizes, gemm::Packer<T>& packer) : Sizes(sizes) {
  expanding = packer.weight("weight1", hidden, channels);
  const gemm::Affine<T> norm1 = packer.norm(hidden, eps[0]);
  const int64_t count = int64_t(side) * side;
  Acc* scaled = packer.arena().template take<Acc>(count * hidden);
  const T* kernels = packer.fills() ? packer.whole("weight2", count * hidden) : nullptr;
  const gemm::Affine<T> norm2 = packer.norm(hidden, eps[1]);
  if (kernels) scale_taps(kernels, norm2.scale, hidden, count, scaled);
  contracting = packer.weight("weight3", outputs, hidden);
  const gemm::Affine<T> norm3 = packer.norm(outputs, eps[2]);
  expanding.scale = norm1.scale, expanding.shift = norm1.shift, expanding.activation = first;
  contracting.scale = norm3.scale, contracting.shift = norm3.shift;
  taps = scaled, shift2 = norm2.shift;
}

template <class T>
void Bands<T>::expand(const T* x, T* memory, int64_t begin, int64_t end) const {
  gemm::Call<T> call = expanding;
  call.a = x + prefix * channels, call.a_stride = channels;
  call.out = memory, call.out_stride = hidden;
  gemm::multiply(call, begin, end);
}

template <class T>
void Bands<T>::contract(const T* x, const T* residual, T* memory, T* out, int64_t begin, int64_t end) const {
  const int64_t row = int64_t(width) * hidden, rows = std::max<int64_t>(1, kBandBytes / (row * int64_t(sizeof(T))));
  const int64_t bands = (end - begin + rows - 1) / rows;
  T* activated = memory + expanded_size() + begin * row;
  DepthwiseCall depthwise{};
  depthwise.shape = {1, tokens(), hidden};
  depthwise.height = height, depthwise.width = width, depthwise.side = side;
  depthwise.in = {memory, tokens()};
  depthwise.first = Activation::identity, depthwise.second = second;
  depthwise.taps = taps, depthwise.bias = shift2;
  gemm::Call<T> product = contracting;
  product.a = activated, product.a_stride = hidden, product.out_stride = outputs;
  for (int64_t band = 0; band < bands; ++band) {
    depthwise.top = int(begin + (end - begin) * band / bands);
    depthwise.bottom = int(begin + (end - begin) * (band + 1) / bands);
    const int64_t count = int64_t(depthwise.bottom - depthwise.top) * width;
    depthwise.out = {activated, count};
    chosen(kIndex<T>).depthwise(depthwise, 0, (hidden + kBlock - 1) / kBlock);
    const int64_t at = (prefix + int64_t(depthwise.top) * width) * outputs;
    product.out = out + at;
    product.residual = residual ? residual + at : nullptr;
    gemm::multiply(product, 0, count);
  }
  for (int64_t i = 0; begin == 0 && i < prefix * outputs; ++i) out[i] = residual ? sum_of(x[i], residual[i]) : x[i];
}

template struct Bands<float>;
template struct Bands<Bf16>;
template struct Bands<double>;

}  // namespace ceit::leff
