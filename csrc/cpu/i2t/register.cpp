// Checks of the stem's kernels on the CPU and their registration, through libtorch's stable ABI. The schemas are in
// ceit_kernels/i2t/cpu.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../capability.h"
#include "calls.h"
#include "i2t.h"

namespace ceit::i2t_cpu {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

const Kernels& kernels_for(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Double,
                  "the kernels compute in float32, bfloat16 and float64");
  return chosen(type == ScalarType::Float ? 0 : type == ScalarType::BFloat16 ? 1 : 2);
}

// What sums and parameters are kept in.
ScalarType real_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void* array(const char* name, const OptionalTensor& tensor, int64_t elements, ScalarType type) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == type, name, ": unexpected dtype");
  STD_TORCH_CHECK(tensor->is_contiguous() && tensor->numel() == elements, name, ": expected ", elements,
                  " contiguous elements, got ", tensor->numel());
  return tensor->data_ptr();
}

// The weight is packed; `out_channels` are those that it has been filled up from.
Convolution convolution(const Tensor& image, const Tensor& weight, int64_t out_channels) {
  STD_TORCH_CHECK(image.dim() == 4, "image: expected 4 dimensions");
  Convolution c{};
  Sizes& s = c.sizes;
  s.batch = image.size(0), s.in_channels = image.size(1), s.height = image.size(2), s.width = image.size(3);
  for (int i = 0; i < 4; ++i) s.strides[i] = image.stride(i);
  s.out_channels = out_channels, s.blocks = (out_channels + kBlock - 1) / kBlock;
  s.conv_height = (s.height - 1) / 2 + 1, s.conv_width = (s.width - 1) / 2 + 1;
  s.pooled_height = (s.conv_height - 1) / 2 + 1, s.pooled_width = (s.conv_width - 1) / 2 + 1;
  c.image = image.data_ptr();
  c.weight = array("weight", weight, s.blocks * s.in_channels * kSide * kSide * kBlock, real_type(image));
  return c;
}

int64_t pooled_elements(const Sizes& s) { return s.batch * s.pooled_height * s.pooled_width * s.out_channels; }

template <class Call>
void run(Kernel<Call> kernel, const Call& call, int64_t tasks, int64_t grain = 1) {
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

}  // namespace

void forward(Tensor image, Tensor weight, Tensor sign, OptionalTensor norm, Tensor out, OptionalTensor indices,
             OptionalTensor moments) {
  const ScalarType type = image.scalar_type(), real = real_type(image);
  const int64_t channels = sign.numel();
  ForwardCall call{};
  call.convolution = convolution(image, weight, channels);
  const Sizes& s = call.convolution.sizes;
  call.sign = array("sign", sign, channels, real);
  call.norm = array("norm", norm, 3 * channels, real);
  call.out = array("out", out, pooled_elements(s), type);
  call.indices = static_cast<uint8_t*>(array("indices", indices, pooled_elements(s), ScalarType::Byte));
  call.moments = array("moments", moments, s.batch * s.conv_height * 2 * channels, real);
  run(kernels_for(image).forward, call, s.batch * s.pooled_height);
}

namespace {

void normalise(Tensor x, Tensor norm, Tensor out) {
  const int64_t channels = norm.numel() / 3;
  const NormaliseCall call{x.numel() / channels, channels, array("norm", norm, 3 * channels, real_type(x)),
                           array("x", x, x.numel() / channels * channels, x.scalar_type()),
                           array("out", out, x.numel(), x.scalar_type())};
  run(kernels_for(x).normalise, call, call.pixels, 64);
}

void sums(Tensor gradient, Tensor x, Tensor mean, Tensor sums) {
  STD_TORCH_CHECK(gradient.dim() == 4, "gradient: expected 4 dimensions");
  const ScalarType type = gradient.scalar_type(), real = real_type(gradient);
  const int64_t rows = gradient.size(0) * gradient.size(1), channels = gradient.size(3);
  const SumsCall call{rows,
                      gradient.size(2),
                      channels,
                      array("gradient", gradient, gradient.numel(), type),
                      array("x", x, gradient.numel(), type),
                      array("mean", mean, channels, real),
                      array("sums", sums, rows * 2 * channels, real)};
  run(kernels_for(gradient).sums, call, rows);
}

void backward(Tensor gradient, Tensor indices, Tensor image, Tensor weight, Tensor coefficients, Tensor grad_weight,
              Tensor products, OptionalTensor grad_convolution) {
  const ScalarType type = image.scalar_type(), real = real_type(image);
  STD_TORCH_CHECK(products.dim() == 2, "products: expected 2 dimensions");
  const int64_t channels = products.size(1);
  BackwardCall call{};
  call.parts = products.size(0);
  call.convolution = convolution(image, weight, channels);
  const Sizes& s = call.convolution.sizes;
  call.gradient = array("gradient", gradient, pooled_elements(s), type);
  call.indices = static_cast<const uint8_t*>(array("indices", indices, pooled_elements(s), ScalarType::Byte));
  call.coefficients = array("coefficients", coefficients, 4 * channels, real);
  call.grad_weight = array("grad_weight", grad_weight, call.parts * weight.numel(), real);
  call.products = array("products", products, call.parts * channels, real);
  call.grad_convolution =
      array("grad_convolution", grad_convolution, s.batch * s.conv_height * s.conv_width * channels, type);
  run(kernels_for(image).backward, call, call.parts);
}

}  // namespace
}  // namespace ceit::i2t_cpu

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_i2t_forward_cpu", TORCH_BOX(&ceit::i2t_cpu::forward));
  m.impl("_i2t_normalise_cpu", TORCH_BOX(&ceit::i2t_cpu::normalise));
  m.impl("_i2t_sums_cpu", TORCH_BOX(&ceit::i2t_cpu::sums));
  m.impl("_i2t_backward_cpu", TORCH_BOX(&ceit::i2t_cpu::backward));
}
