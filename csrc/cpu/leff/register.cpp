// LeFF's inference image by image, and its registration. The schemas are in ceit_kernels/leff.
#include "../convnet/unit.h"
#include "../scalar.h"
#include "inference.h"

namespace ceit::leff {
namespace {

Sizes sizes_of(const std::vector<double>& eps, const std::vector<int64_t>& numbers) {
  STD_TORCH_CHECK(numbers.size() == 9 && eps.size() == 3, "sizes, eps: expected 9 and 3 numbers");
  Sizes sizes{};
  sizes.channels = numbers[0], sizes.hidden = numbers[1], sizes.outputs = numbers[2], sizes.side = int(numbers[3]);
  sizes.first = gemm::activation_of(numbers[4]), sizes.second = gemm::activation_of(numbers[5]);
  sizes.height = int(numbers[6]), sizes.width = int(numbers[7]);
  std::copy_n(eps.data(), 3, sizes.eps);
  return sizes;
}

// The layers for one image, of which the depthwise convolution may have a stride.
template <class T>
convnet::Unit<T> unit_of(const Inference<T>& leff, int64_t stride) {
  using Layer = convnet::Layer<T>;
  Layer depthwise(leff.hidden, leff.side, leff.second, leff.taps, leff.shift2);
  depthwise.stride = int(stride);
  return {Layer(leff.expanding), depthwise, Layer(leff.contracting)};
}

// An image in planes, all of its tokens.
template <class T, class Run>
void infer_planes(const convnet::Unit<T>& unit, const convnet::Map& in, const T* x, const T* residual, T* memory,
                  T* out, const Run& run) {
  const convnet::Map map = unit.map(in);
  T *tokens = memory + unit.memory(in), *result = tokens + in.elements(), *added = result + map.elements();
  convnet::from_planes(x, in, tokens, run);
  if (residual) convnet::from_planes(residual, map, added, run);
  unit.infer(in, tokens, residual ? added : nullptr, memory, result, run);
  convnet::to_planes(result, map, out, run);
}

// out (B, rows, O) of tokens x (B, rows, C), of the type that is computed in; all are contiguous or, without prefix
// tokens, transposed, as images in planes are. With a stride, which goes without prefix tokens, out has fewer rows.
// parameters: of each of three convolutions
// weight, bias, norm weight, norm bias, running mean and running variance; or `prepacked`, what `prepack` made of them.
// eps: of the norms. numbers: C, E, O, side of the kernel, both activations, height, width, stride.
void infer(Tensor x, std::vector<OptionalTensor> parameters, OptionalTensor prepacked, OptionalTensor residual,
           std::vector<double> eps, std::vector<int64_t> numbers, Tensor out) {
  Sizes sizes = sizes_of(eps, numbers);
  const int64_t batch = x.size(0), rows = x.size(1), tokens = int64_t(sizes.height) * sizes.width, stride = numbers[8];
  STD_TORCH_CHECK(stride == 1 || (stride == 2 && rows == tokens), "stride: expected 1, or 2 without prefix tokens");
  const int64_t out_rows = rows - tokens + ceil_div(sizes.height, stride) * ceil_div(sizes.width, stride);
  STD_TORCH_CHECK(
      x.dim() == 3 && out.dim() == 3 && rows >= tokens && (rows == tokens || sizes.channels == sizes.outputs),
      "x: expected (B, rows, C) with the image's rows last, and as wide as out where there are others");
  sizes.prefix = rows - tokens;
  const bool in_planes = !x.is_contiguous();
  STD_TORCH_CHECK(!in_planes || !sizes.prefix, "x: expected contiguous rows where there are prefix tokens");
  const auto in_memory = [&](const Tensor& rows) { return in_planes ? torch::stable::transpose(rows, 1, 2) : rows; };
  if (residual) residual = in_memory(*residual);
  with_dtype(x, [&](auto type) {
    using T = decltype(type);
    const T* from = elements<T>("x", in_memory(x), batch * rows * sizes.channels);
    T* to = elements<T>("out", in_memory(out), batch * out_rows * sizes.outputs);
    const T* rest = elements<T>("residual", residual, out.numel());
    const auto make = [&](gemm::Packer<T>& packer) { return Inference<T>(sizes, packer); };
    gemm::with_prepacked<T>(parameters, prepacked, make, [&](const Inference<T>& leff) {
      const convnet::Unit<T> unit = unit_of(leff, stride);
      const convnet::Map in{sizes.height, sizes.width, sizes.channels}, map = unit.map(in);
      const int64_t planes = in_planes ? in.elements() + 2 * map.elements() : 0;
      const int64_t bytes = (unit.memory(in) + planes) * int64_t(sizeof(T));
      gemm::for_images(batch, bytes, [&](int64_t image, gemm::Place place, auto run) {
        const T* tokens = from + image * rows * sizes.channels;
        T *memory = static_cast<T*>(place.memory), *result = to + image * out_rows * sizes.outputs;
        const T* added = rest ? rest + image * out_rows * sizes.outputs : nullptr;
        if (in_planes) return infer_planes(unit, in, tokens, added, memory, result, run);
        const int64_t prefix = sizes.prefix * sizes.channels;
        for (int64_t i = 0; i < prefix; ++i) result[i] = added ? sum_of(tokens[i], added[i]) : tokens[i];
        unit.infer(in, tokens + prefix, added ? added + prefix : nullptr, memory, result + prefix, run);
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
