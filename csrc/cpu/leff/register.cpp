// LeFF's inference image by image, and its registration. The schemas are in ceit_kernels/leff.
#include "inference.h"

namespace ceit::leff {
namespace {

Sizes sizes_of(const std::vector<double>& eps, const std::vector<int64_t>& numbers) {
  STD_TORCH_CHECK(numbers.size() == 8 && eps.size() == 3, "sizes, eps: expected 8 and 3 numbers");
  Sizes sizes{};
  sizes.channels = numbers[0], sizes.hidden = numbers[1], sizes.outputs = numbers[2], sizes.side = int(numbers[3]);
  sizes.first = gemm::activation_of(numbers[4]), sizes.second = gemm::activation_of(numbers[5]);
  sizes.height = int(numbers[6]), sizes.width = int(numbers[7]);
  std::copy_n(eps.data(), 3, sizes.eps);
  return sizes;
}

// out (B, rows, O) of tokens x (B, rows, C), of the type that is computed in. parameters: of each of three convolutions
// weight, bias, norm weight, norm bias, running mean and running variance; or `prepacked`, what `prepack` made of them.
// eps: of the norms. numbers: C, E, O, side of the kernel, both activations, height, width.
void infer(Tensor x, std::vector<OptionalTensor> parameters, OptionalTensor prepacked, OptionalTensor residual,
           std::vector<double> eps, std::vector<int64_t> numbers, Tensor out) {
  Sizes sizes = sizes_of(eps, numbers);
  const int64_t batch = x.size(0), rows = x.size(1), tokens = int64_t(sizes.height) * sizes.width;
  STD_TORCH_CHECK(
      x.dim() == 3 && out.dim() == 3 && rows >= tokens && (rows == tokens || sizes.channels == sizes.outputs),
      "x: expected (B, rows, C) with the image's rows last, and as wide as out where there are others");
  sizes.prefix = rows - tokens;
  with_dtype(x, [&](auto type) {
    using T = decltype(type);
    const T* from = elements<T>("x", x, batch * rows * sizes.channels);
    T* to = elements<T>("out", out, batch * rows * sizes.outputs);
    const T* rest = elements<T>("residual", residual, out.numel());
    const auto make = [&](gemm::Packer<T>& packer) { return Inference<T>(sizes, packer); };
    gemm::with_prepacked<T>(parameters, prepacked, make, [&](const Inference<T>& leff) {
      gemm::for_images(batch, leff.memory() * int64_t(sizeof(T)), [&](int64_t image, gemm::Place place, auto run) {
        T* memory = static_cast<T*>(place.memory);
        const T* in = from + image * rows * sizes.channels;
        const int64_t start = image * rows * sizes.outputs;
        run(tokens, [&](int64_t begin, int64_t end) { leff.expand(in, memory, begin, end); });
        run(sizes.height, [&](int64_t begin, int64_t end) {
          leff.contract(in, rest ? rest + start : nullptr, memory, to + start, begin, end);
        });
      });
    });
  });
}

Tensor prepack(Tensor like, std::vector<OptionalTensor> parameters, std::vector<double> eps,
               std::vector<int64_t> numbers) {
  const Sizes sizes = sizes_of(eps, numbers);
  return with_dtype(like, [&](auto type) {
    using T = decltype(type);
    return gemm::prepack<T>(like, parameters, [&](gemm::Packer<T>& packer) { return Inference<T>(sizes, packer); });
  });
}

}  // namespace
}  // namespace ceit::leff

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_leff_infer", TORCH_BOX(&ceit::leff::infer));
  m.impl("_leff_prepack", TORCH_BOX(&ceit::leff::prepack));
}
