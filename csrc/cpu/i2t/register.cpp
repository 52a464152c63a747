// Checks of the stem's arguments on the CPU, and its registration. The schemas are in ceit_kernels/i2t.
#include "../../tensors.h"
#include "../capability.h"
#include "calls.h"
#include "i2t.h"

namespace ceit::i2t_cpu {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

namespace {

// The weight is packed; `out_channels` are those that it has been filled up from.
Convolution convolution(const Tensor& image, const Tensor& weight, int64_t out_channels) {
  STD_TORCH_CHECK(image.dim() == 4, "image: expected 4 dimensions");
  Convolution c{};
  Sizes& s = c.sizes;
  s.batch = image.size(0), s.in_channels = image.size(1), s.height = image.size(2), s.width = image.size(3);
  for (int i = 0; i < 4; ++i) s.strides[i] = image.stride(i);
  s.out_channels = out_channels, s.panels = ceil_div(out_channels, kPanelChannels);
  s.conv_height = (s.height - 1) / 2 + 1, s.conv_width = (s.width - 1) / 2 + 1;
  s.pooled_height = (s.conv_height - 1) / 2 + 1, s.pooled_width = (s.conv_width - 1) / 2 + 1;
  c.image = image.data_ptr();
  c.weight = elements("weight", weight, s.panels * s.in_channels * kSide * kSide * kPanelChannels, acc_dtype(image));
  return c;
}

int64_t pooled_elements(const Sizes& s) { return s.batch * s.pooled_height * s.pooled_width * s.out_channels; }

}  // namespace

void forward(Tensor image, Tensor weight, Tensor sign, OptionalTensor norm, Tensor out, OptionalTensor indices,
             OptionalTensor moments) {
  const ScalarType type = image.scalar_type(), acc = acc_dtype(image);
  const int64_t channels = sign.numel();
  ForwardCall call{};
  call.convolution = convolution(image, weight, channels);
  const Sizes& s = call.convolution.sizes;
  call.sign = elements("sign", sign, channels, acc);
  call.norm = elements("norm", norm, 3 * channels, acc);
  call.out = elements("out", out, pooled_elements(s), type);
  call.indices = elements<uint8_t>("indices", indices, pooled_elements(s));
  call.moments = elements("moments", moments, s.batch * s.conv_height * 2 * channels, acc);
  run_tasks(chosen(dtype_index(image)).forward, call, s.batch * s.pooled_height);
}

namespace {

void normalise(Tensor x, Tensor norm, Tensor out) {
  const int64_t channels = norm.numel() / 3;
  STD_TORCH_CHECK(channels > 0, "norm: expected three numbers for each channel, got ", norm.numel(), " in all");
  NormaliseCall call{};
  call.channels = channels, call.pixels = x.numel() / channels;
  call.norm = elements("norm", norm, 3 * channels, acc_dtype(x));
  call.x = elements("x", x, call.pixels * channels, x.scalar_type());
  call.out = elements("out", out, x.numel(), x.scalar_type());
  run_tasks(chosen(dtype_index(x)).normalise, call, call.pixels, 64);
}

void sums(Tensor gradient, Tensor x, Tensor mean, Tensor sums) {
  STD_TORCH_CHECK(gradient.dim() == 4, "gradient: expected 4 dimensions");
  const ScalarType type = gradient.scalar_type(), acc = acc_dtype(gradient);
  SumsCall call{};
  call.rows = gradient.size(0) * gradient.size(1), call.width = gradient.size(2), call.channels = gradient.size(3);
  call.gradient = elements("gradient", gradient, gradient.numel(), type);
  call.x = elements("x", x, gradient.numel(), type);
  call.mean = elements("mean", mean, call.channels, acc);
  call.sums = elements("sums", sums, call.rows * 2 * call.channels, acc);
  run_tasks(chosen(dtype_index(gradient)).sums, call, call.rows);
}

void backward(Tensor gradient, Tensor indices, Tensor image, Tensor weight, Tensor coefficients, Tensor grad_weight,
              Tensor centred_sums, OptionalTensor grad_convolution) {
  const ScalarType type = image.scalar_type(), acc = acc_dtype(image);
  STD_TORCH_CHECK(centred_sums.dim() == 2, "centred_sums: expected 2 dimensions");
  const int64_t channels = centred_sums.size(1);
  BackwardCall call{};
  call.parts = centred_sums.size(0);
  call.convolution = convolution(image, weight, channels);
  const Sizes& s = call.convolution.sizes;
  call.gradient = elements("gradient", gradient, pooled_elements(s), type);
  call.indices = elements<uint8_t>("indices", indices, pooled_elements(s));
  call.coefficients = elements("coefficients", coefficients, 4 * channels, acc);
  call.grad_weight = elements("grad_weight", grad_weight, call.parts * weight.numel(), acc);
  call.centred_sums = elements("centred_sums", centred_sums, call.parts * channels, acc);
  call.grad_convolution =
      elements("grad_convolution", grad_convolution, s.batch * s.conv_height * s.conv_width * channels, type);
  run_tasks(chosen(dtype_index(image)).backward, call, call.parts);
}

}  // namespace
}  // namespace ceit::i2t_cpu

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_i2t_forward_cpu", TORCH_BOX(&ceit::i2t_cpu::forward));
  m.impl("_i2t_normalise_cpu", TORCH_BOX(&ceit::i2t_cpu::normalise));
  m.impl("_i2t_sums_cpu", TORCH_BOX(&ceit::i2t_cpu::sums));
  m.impl("_i2t_backward_cpu", TORCH_BOX(&ceit::i2t_cpu::backward));
}
