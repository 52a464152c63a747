#include "bands.h"

#include "../capability.h"
#include "../sums.h"
#include "stages.h"

namespace ceit::leff {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

namespace {

// Hidden tokens that stay in the second level of cache between the convolution and the product behind it.
constexpr int64_t kBandBytes = 640 << 10;

using torch::stable::Tensor;

}  // namespace

template <class T>
Bands<T>::Bands(int64_t channels, int64_t prefix, int64_t height, int64_t width, int64_t outputs, const Tensor& weight1,
             const Tensor& bias1, const Tensor& taps, const Tensor& bias2, const Tensor& weight3, const Tensor& bias3,
             int64_t first, int64_t second)
    : channels(channels),
      hidden(taps.size(1)),
      outputs(outputs),
      prefix(prefix),
      height(int(height)),
      width(int(width)),
      side(taps.size(0) == 9 ? 3 : taps.size(0) == 25 ? 5 : 7),
      first(checked_activation(first)),
      second(checked_activation(second)),
      expanding(panels::call<T>(weight1, bias1, channels, hidden)),
      contracting(panels::call<T>(weight3, bias3, hidden, outputs)),
      taps(panels::floats("taps", taps, int64_t(side) * side * hidden)),
      bias2(panels::floats("bias2", bias2, hidden)) {
  expanding.activation = this->first;
}

template <class T>
void Bands<T>::expand(const T* x, T* memory, int64_t begin, int64_t end) const {
  panels::Call<T> call = expanding;
  call.a = x + prefix * channels, call.a_stride = channels;
  call.out = memory, call.out_stride = hidden;
  panels::multiply(call, begin, end);
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
  depthwise.taps = taps, depthwise.bias = bias2;
  panels::Call<T> product = contracting;
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
    panels::multiply(product, 0, count);
  }
  for (int64_t i = 0; begin == 0 && i < prefix * outputs; ++i) out[i] = residual ? sum_of(x[i], residual[i]) : x[i];
}

template struct Bands<float>;
template struct Bands<Bf16>;

}  // namespace ceit::leff
