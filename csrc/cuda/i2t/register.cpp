// Checks of the stem's operators and their registration with PyTorch's dispatcher, through libtorch's stable ABI. The
// schemas are in ceit_kernels/i2t/cuda.py. Built over csrc/simt the same operators serve CPU tensors, for tests.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "calls.h"

namespace ceit::i2t {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void* data(const Tensor& tensor) { return tensor.data_ptr(); }
void* data(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

void check_contiguous(const char* name, const Tensor& tensor, ScalarType type, int64_t elements) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": unexpected dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
  STD_TORCH_CHECK(tensor.numel() >= elements, name, ": expected at least ", elements, " elements, got ",
                  tensor.numel());
}

// The pooled map in memory: (B, H', W', O), as a contiguous tensor of these sizes.
void check_pooled(const char* name, const Tensor& tensor, const Sizes& s, ScalarType type) {
  check_contiguous(name, tensor, type, int64_t(s.batch) * s.pooled_height * s.pooled_width * s.out_channels);
}

Sizes make_sizes(const Tensor& image, const Tensor& weight) {
  STD_TORCH_CHECK(image.dim() == 4 && weight.dim() == 4, "image and weight: expected 4 dimensions");
  STD_TORCH_CHECK(weight.size(2) == 7 && weight.size(3) == 7, "weight: expected a kernel of 7 x 7");
  STD_TORCH_CHECK(image.size(1) == weight.size(1) && image.size(1) <= 4,
                  "image: expected up to 4 channels, as the weight");
  STD_TORCH_CHECK(weight.size(0) % 32 == 0 && weight.size(0) <= 96, "weight: expected 32, 64 or 96 output channels");
  Sizes s{};
  s.batch = int(image.size(0));
  s.channels = int(image.size(1));
  s.height = int(image.size(2));
  s.width = int(image.size(3));
  for (int i = 0; i < 4; ++i) s.strides[i] = image.stride(i);
  s.conv_height = (s.height - 1) / 2 + 1;
  s.conv_width = (s.width - 1) / 2 + 1;
  s.pooled_height = (s.conv_height - 1) / 2 + 1;
  s.pooled_width = (s.conv_width - 1) / 2 + 1;
  s.out_channels = int(weight.size(0));
  return s;
}

bool is_half(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

ScalarType real_type(ScalarType compute) {
  return compute == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void fill(Call& call, const Tensor& image, const Tensor& weight, const OptionalTensor& gamma, const Tensor& mean,
          const Tensor& variance, const Tensor& packed, double eps, bool training) {
  const ScalarType compute = packed.scalar_type(), real = real_type(compute);
  call.sizes = make_sizes(image, weight);
  const int64_t channels = call.sizes.out_channels;
  check_contiguous("weight", weight, real, weight.numel());
  if (gamma) check_contiguous("gamma", *gamma, real, channels);
  check_contiguous("mean", mean, real, channels);
  check_contiguous("variance", variance, real, channels);
  check_contiguous("packed", packed, compute, channels * kPackedPerChannel);
  STD_TORCH_CHECK(image.scalar_type() == compute || (is_half(compute) && image.scalar_type() == ScalarType::Float),
                  "image: expected the dtype of the computation, or float32 for one of 16 bits");
  call.image = image.data_ptr();
  call.weight = data(weight);
  call.gamma = data(gamma);
  call.mean = data(mean);
  call.variance = data(variance);
  call.packed = data(packed);
  call.eps = eps;
  call.training = training;
#ifndef CEIT_ON_HOST
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(image.get_device_index(), &call.stream));
#endif
}

// The instance that computes in the dtype of `packed` on an image of its dtype.
template <template <class, class> class Run, class SomeCall>
void dispatch(const SomeCall& call, ScalarType compute, ScalarType image, bool tensor_cores) {
  const bool from_float = image == ScalarType::Float;
  if (compute == ScalarType::BFloat16)
    from_float ? Run<HalfProducts<Bf16>, float>::run(call) : Run<HalfProducts<Bf16>, Bf16>::run(call);
  else if (compute == ScalarType::Half)
    from_float ? Run<HalfProducts<Fp16>, float>::run(call) : Run<HalfProducts<Fp16>, Fp16>::run(call);
  else if (compute == ScalarType::Float)
    tensor_cores ? Run<Tf32Products, float>::run(call) : Run<ScalarProducts<float>, float>::run(call);
#ifdef CEIT_ON_HOST
  else if (compute == ScalarType::Double)
    Run<ScalarProducts<double>, double>::run(call);
#endif
  else
    STD_TORCH_CHECK(false, "the kernels compute in float32, float16 and bfloat16");
}

template <class P, class In>
struct Forward {
  static void run(const ForwardCall& call) { forward<P, In>(call); }
};
template <class P, class In>
struct Backward {
  static void run(const BackwardCall& call) { backward<P, In>(call); }
};

class OnDevice {
 public:
#ifdef CEIT_ON_HOST
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

void i2t_forward(Tensor image, Tensor weight, OptionalTensor gamma, OptionalTensor beta, Tensor mean, Tensor variance,
                 Tensor packed, OptionalTensor moments, Tensor out, OptionalTensor indices, double eps, bool training,
                 bool tensor_cores, int64_t rows_per_block) {
  const OnDevice guard(image);
  ForwardCall call{};
  fill(call, image, weight, gamma, mean, variance, packed, eps, training);
  const ScalarType compute = packed.scalar_type(), real = real_type(compute);
  call.rows_per_block = int(rows_per_block);
  if (beta) check_contiguous("beta", *beta, real, call.sizes.out_channels);
  check_pooled("out", out, call.sizes, compute);
  if (indices) check_pooled("indices", *indices, call.sizes, ScalarType::Byte);
  STD_TORCH_CHECK(!training || (moments && indices), "moments and indices: expected in training");
  if (training) check_contiguous("moments", *moments, real, moments_elements(call.sizes, call.rows_per_block));
  call.beta = data(beta);
  call.moments = data(moments);
  call.out = data(out);
  call.indices = static_cast<uint8_t*>(data(indices));
  dispatch<Forward>(call, compute, image.scalar_type(), tensor_cores);
}

void i2t_backward(Tensor gradient, Tensor indices, Tensor image, Tensor weight, OptionalTensor gamma, Tensor mean,
                  Tensor variance, Tensor packed, Tensor sums, Tensor grad_weight, Tensor grad_gamma, Tensor grad_beta,
                  OptionalTensor grad_image, double eps, bool training, bool tensor_cores, int64_t blocks) {
  const OnDevice guard(image);
  BackwardCall call{};
  fill(call, image, weight, gamma, mean, variance, packed, eps, training);
  const ScalarType compute = packed.scalar_type(), real = real_type(compute);
  call.blocks = int(blocks);
  check_pooled("gradient", gradient, call.sizes, compute);
  check_pooled("indices", indices, call.sizes, ScalarType::Byte);
  check_contiguous("sums", sums, real, sums_elements(call.sizes, call.blocks));
  check_contiguous("grad_weight", grad_weight, real, weight.numel());
  check_contiguous("grad_gamma", grad_gamma, real, call.sizes.out_channels);
  check_contiguous("grad_beta", grad_beta, real, call.sizes.out_channels);
  if (grad_image) check_contiguous("grad_image", *grad_image, image.scalar_type(), image.numel());
  call.gradient = data(gradient);
  call.indices = static_cast<const uint8_t*>(data(indices));
  call.sums = data(sums);
  call.grad_weight = data(grad_weight);
  call.grad_gamma = data(grad_gamma);
  call.grad_beta = data(grad_beta);
  call.grad_image = data(grad_image);
  dispatch<Backward>(call, compute, image.scalar_type(), tensor_cores);
}

}  // namespace
}  // namespace ceit::i2t

#ifdef CEIT_ON_HOST
#define CEIT_KEY CPU
#else
#define CEIT_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(ceit, CEIT_KEY, m) {
  m.impl("_i2t_forward", TORCH_BOX(&ceit::i2t::i2t_forward));
  m.impl("_i2t_backward", TORCH_BOX(&ceit::i2t::i2t_backward));
}
