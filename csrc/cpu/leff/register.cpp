// LeFF's inference image by image, by bands of rows, and its registration. The schemas are in ceit_kernels/leff.
#include <utility>

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

// Bytes of the hidden tokens of a band: a large image's do not stay in cache.
constexpr int64_t kBandBytes = 8 << 20;

// The rows of the image of which a band is made.
template <class T>
int band_of(const Inference<T>& leff) {
  const int64_t fitting = kBandBytes / (2 * leff.width * leff.hidden * int64_t(sizeof(T)));
  return int(std::min<int64_t>(leff.height, std::max<int64_t>(fitting, 8 * leff.side)));
}

// An image by bands of rows, each with those that the convolution reads above and below.
template <class T, class Run>
void infer_image(const Inference<T>& leff, int rows, const T* x, const T* residual, T* memory, T* out, const Run& run) {
  for (int top = 0; top < leff.height; top += rows) {
    const int bottom = std::min(leff.height, top + rows), halo = leff.side / 2;
    const int first = std::max(0, top - halo), last = std::min(leff.height, bottom + halo);
    Inference<T> band = leff;
    band.height = last - first;
    const int64_t prefix = first ? std::exchange(band.prefix, 0) : 0;
    const T* in = x + prefix * leff.channels + leff.row(first, leff.channels);
    const int64_t at = prefix * leff.outputs + leff.row(first, leff.outputs);
    run(band.tokens(), [&](int64_t begin, int64_t end) { band.expand(in, memory, begin, end); });
    run(bottom - top, [&](int64_t begin, int64_t end) {
      band.contract(in, residual ? residual + at : nullptr, memory, out + at, top - first + begin, top - first + end);
    });
  }
}

// out (B, rows, O) of tokens x (B, rows, C), of the type that is computed in; all are contiguous or, without prefix
// tokens, transposed, as images in planes are. parameters: of each of three convolutions
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
  sizes.plane = x.is_contiguous() ? 0 : rows;
  STD_TORCH_CHECK(!sizes.plane || !sizes.prefix, "x: expected contiguous rows where there are prefix tokens");
  const auto in_memory = [&](const Tensor& rows) { return sizes.plane ? torch::stable::transpose(rows, 1, 2) : rows; };
  if (residual) residual = in_memory(*residual);
  with_dtype(x, [&](auto type) {
    using T = decltype(type);
    const T* from = elements<T>("x", in_memory(x), batch * rows * sizes.channels);
    T* to = elements<T>("out", in_memory(out), batch * rows * sizes.outputs);
    const T* rest = elements<T>("residual", residual, out.numel());
    const auto make = [&](gemm::Packer<T>& packer) { return Inference<T>(sizes, packer); };
    gemm::with_prepacked<T>(parameters, prepacked, make, [&](const Inference<T>& leff) {
      const int band = band_of(leff);
      Inference<T> largest = leff;
      largest.height = std::min(leff.height, band + leff.side - 1);
      gemm::for_images(batch, largest.memory() * int64_t(sizeof(T)), [&](int64_t image, gemm::Place place, auto run) {
        const int64_t start = image * rows * sizes.outputs;
        infer_image(leff, band, from + image * rows * sizes.channels, rest ? rest + start : nullptr,
                    static_cast<T*>(place.memory), to + start, run);
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
