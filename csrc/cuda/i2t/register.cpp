// Checks of the stem's arguments on a GPU, and its registration. The schemas are in ceit_kernels/i2t.
#include <stream.h>

#include "calls.h"

namespace ceit::i2t {
namespace {

Problem problem_of(const Tensor& image, const Tensor& weight) {
  STD_TORCH_CHECK(image.dim() == 4 && weight.dim() == 4, "image and weight: expected 4 dimensions");
  STD_TORCH_CHECK(weight.size(2) == 7 && weight.size(3) == 7, "weight: expected a kernel of 7 x 7");
  STD_TORCH_CHECK(image.size(1) == weight.size(1) && image.size(1) <= 4,
                  "image: expected up to 4 channels, as the weight");
  STD_TORCH_CHECK(weight.size(0) % 32 == 0 && weight.size(0) <= 96, "weight: expected 32, 64 or 96 output channels");
  Problem s{};
  s.batch = int(image.size(0)), s.channels = int(image.size(1));
  s.height = int(image.size(2)), s.width = int(image.size(3));
  s.stride_batch = image.stride(0), s.stride_channel = image.stride(1);
  s.stride_row = image.stride(2), s.stride_column = image.stride(3);
  s.conv_height = (s.height - 1) / 2 + 1, s.conv_width = (s.width - 1) / 2 + 1;
  s.pooled_height = (s.conv_height - 1) / 2 + 1, s.pooled_width = (s.conv_width - 1) / 2 + 1;
  s.out_channels = int(weight.size(0));
  return s;
}

bool is_half(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

void fill(Call& call, const Tensor& image, const Tensor& weight, const OptionalTensor& gamma, const Tensor& mean,
          const Tensor& variance, const Tensor& packed, double eps, bool training) {
  const ScalarType dtype = packed.scalar_type(), acc = acc_dtype(dtype);
  call.problem = problem_of(image, weight);
  const int64_t channels = call.problem.out_channels;
  STD_TORCH_CHECK(image.scalar_type() == dtype || (is_half(dtype) && image.scalar_type() == ScalarType::Float),
                  "image: expected the dtype of the computation, or float32 for one of 16 bits");
  call.image = image.data_ptr();
  call.weight = elements("weight", weight, weight.numel(), acc);
  call.gamma = elements("gamma", gamma, channels, acc);
  call.mean = elements("mean", mean, channels, acc), call.variance = elements("variance", variance, channels, acc);
  call.packed = elements("packed", packed, channels * kPackedPerChannel, dtype);
  call.eps = eps;
  call.training = training;
  call.stream = stream_of(image);
}

// By the instance that computes in the dtype of `packed` on an image of its dtype.
template <class SomeCall>
void dispatch(const SomeCall& call, ScalarType dtype, ScalarType image, bool tensor_cores) {
  const bool from_float = image == ScalarType::Float;
  if (dtype == ScalarType::BFloat16)
    from_float ? compute<HalfMma<Bf16>, float>(call) : compute<HalfMma<Bf16>, Bf16>(call);
  else if (dtype == ScalarType::Half)
    from_float ? compute<HalfMma<Fp16>, float>(call) : compute<HalfMma<Fp16>, Fp16>(call);
  else if (dtype == ScalarType::Float)
    tensor_cores ? compute<Tf32Mma, float>(call) : compute<ScalarMma<float>, float>(call);
  else {
    STD_TORCH_CHECK(kComputesInDouble && dtype == ScalarType::Double,
                    "the kernels compute in float32, float16 and bfloat16");
    if constexpr (kComputesInDouble) compute<ScalarMma<double>, double>(call);
  }
}

void i2t_forward(Tensor image, Tensor weight, OptionalTensor gamma, OptionalTensor beta, Tensor mean, Tensor variance,
                 Tensor packed, OptionalTensor moments, Tensor out, OptionalTensor indices, OptionalTensor running_mean,
                 OptionalTensor running_variance, OptionalTensor batches, double eps, bool training, bool tensor_cores,
                 int64_t rows_per_block, double momentum, double unbiased) {
  const DeviceGuard guard(image.get_device_index());
  ForwardCall call{};
  fill(call, image, weight, gamma, mean, variance, packed, eps, training);
  const ScalarType dtype = packed.scalar_type(), acc = acc_dtype(dtype);
  call.rows_per_block = int(rows_per_block);
  const int64_t channels = call.problem.out_channels, pooled = call.problem.pooled_elements();
  STD_TORCH_CHECK(!training || (moments && indices), "moments and indices: expected in training");
  call.beta = elements("beta", beta, channels, acc);
  call.moments = elements("moments", moments, moments_elements(call.problem, call.rows_per_block), acc);
  call.out = elements("out", out, pooled, dtype);
  call.indices = elements<uint8_t>("indices", indices, pooled);
  STD_TORCH_CHECK(running_mean.has_value() == running_variance.has_value(), "running_variance: expected with its mean");
  const ScalarType running = running_mean && running_mean->scalar_type() == acc ? acc : dtype;
  call.running_mean = elements("running_mean", running_mean, channels, running);
  call.running_variance = elements("running_variance", running_variance, channels, running);
  call.batches = static_cast<int64_t*>(elements("batches", batches, 1, ScalarType::Long));
  call.running_in_acc = running == acc;
  call.momentum = momentum, call.unbiased = unbiased;
  dispatch(call, dtype, image.scalar_type(), tensor_cores);
}

void i2t_backward(Tensor gradient, Tensor indices, Tensor image, Tensor weight, OptionalTensor gamma, Tensor mean,
                  Tensor variance, Tensor packed, Tensor sums, Tensor grad_weight, Tensor grad_gamma, Tensor grad_beta,
                  OptionalTensor grad_image, double eps, bool training, bool tensor_cores, int64_t blocks) {
  const DeviceGuard guard(image.get_device_index());
  BackwardCall call{};
  fill(call, image, weight, gamma, mean, variance, packed, eps, training);
  const ScalarType dtype = packed.scalar_type(), acc = acc_dtype(dtype);
  call.blocks = int(blocks);
  const int64_t channels = call.problem.out_channels, pooled = call.problem.pooled_elements();
  call.gradient = elements("gradient", gradient, pooled, dtype);
  call.indices = elements<uint8_t>("indices", indices, pooled);
  call.sums = elements("sums", sums, sums_elements(call.problem, call.blocks), acc);
  call.grad_weight = elements("grad_weight", grad_weight, weight.numel(), acc);
  call.grad_gamma = elements("grad_gamma", grad_gamma, channels, acc);
  call.grad_beta = elements("grad_beta", grad_beta, channels, acc);
  call.grad_image = elements("grad_image", grad_image, image.numel(), image.scalar_type());
  dispatch(call, dtype, image.scalar_type(), tensor_cores);
}

}  // namespace
}  // namespace ceit::i2t

STABLE_TORCH_LIBRARY_IMPL(ceit, CEIT_DISPATCH_KEY, m) {
  m.impl("_i2t_forward", TORCH_BOX(&ceit::i2t::i2t_forward));
  m.impl("_i2t_backward", TORCH_BOX(&ceit::i2t::i2t_backward));
}
