// LeFF's kernels and matmuls in their order, and the arrays of the norms between them. Where a batch is shared by
// several processes, operators of ceit_kernels/leff put together what each has summed up.
#include "training.h"

#include <array>
#include <string>
#include <vector>

#include "../capability.h"
#include "../gemm/gemm.h"

namespace ceit::leff {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

namespace {

using torch::stable::narrow;
using torch::stable::view;

enum class Mode { none, frozen, batch };

// A convolution and its norm.
struct Layer {
  Tensor weight;
  OptionalTensor bias, norm_weight, norm_bias, running_mean, running_var;
  double eps;
  Mode mode;
  int64_t channels() const { return weight.size(0); }
  // (rows, all that a row has).
  Tensor matrix() const { return view(weight, {channels(), weight.numel() / channels()}); }
};

constexpr size_t kLayers = 3, kTensors = 6, kGradients = 4;

std::array<Layer, kLayers> layers_of(const std::vector<OptionalTensor>& parameters, const std::vector<double>& eps,
                                     const std::vector<int64_t>& modes) {
  STD_TORCH_CHECK(parameters.size() == kLayers * kTensors && eps.size() == kLayers && modes.size() == kLayers,
                  "parameters, eps, modes: expected those of 3 layers");
  const auto layer = [&](size_t i) {
    const OptionalTensor* at = &parameters[i * kTensors];
    STD_TORCH_CHECK(at[0].has_value() && (at[0]->dim() == 4 || (at[0]->dim() == 2 && i != 1)) &&
                        at[0]->is_contiguous() && at[0]->numel() > 0,
                    "parameters: expected contiguous weights (channels, *, k, k), pointwise ones also as matrices");
    STD_TORCH_CHECK(modes[i] >= 0 && modes[i] <= int64_t(Mode::batch), "modes: unknown mode ", modes[i]);
    return Layer{*at[0], at[1], at[2], at[3], at[4], at[5], eps[i], Mode(modes[i])};
  };
  return {layer(0), layer(1), layer(2)};
}

// What a call is of, beside its tensors.
struct Sizes {
  int64_t images, rows, tokens, hidden, outputs;
  Activation first, second;
  int height, width, side;
  Sizes(const Tensor& x, const std::vector<int64_t>& sizes, const std::array<Layer, kLayers>& layers) {
    STD_TORCH_CHECK(sizes.size() == 4, "sizes: expected two activations, height and width");
    STD_TORCH_CHECK(x.dim() == 3 && x.numel() > 0, "x: expected tokens (B, rows, C)");
    first = gemm::activation_of(sizes[0]), second = gemm::activation_of(sizes[1]);
    height = int(sizes[2]), width = int(sizes[3]), side = int(layers[1].weight.size(3));
    images = x.size(0), rows = x.size(1), tokens = sizes[2] * sizes[3];
    hidden = layers[0].channels(), outputs = layers[2].channels();
    STD_TORCH_CHECK(rows >= tokens, "x: expected at least ", tokens, " rows, got ", rows);
    STD_TORCH_CHECK(side == 3 || side == 5 || side == 7, "parameters: expected a side of 3, 5 or 7, got ", side);
    STD_TORCH_CHECK(layers[1].weight.numel() == hidden * side * side && layers[2].matrix().size(1) == hidden,
                    "parameters: expected weights of ", hidden, " hidden channels");
  }
  Shape of_hidden() const { return {images, tokens, hidden}; }
  Shape of_outputs() const { return {images, tokens, outputs}; }
};

OptionalTensor unless_empty(const Tensor& tensor) {
  return tensor.numel() == 0 ? std::nullopt : OptionalTensor(tensor);
}

void* data_of(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

Tensor rows_of(Tensor matrix, int64_t first, int64_t count) { return narrow(matrix, 0, first, count); }

template <size_t results, class... Arguments>
std::array<Tensor, results> call_operator(const char* name, const Arguments&... arguments) {
  StableIValue stack[] = {torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
  std::array<Tensor, results> found;
  for (size_t i = 0; i < results; ++i) found[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return found;
}

// The moments of all processes and of how many tokens each has taken them.
std::array<Tensor, 2> gather(const Tensor& moments, int64_t tokens, const std::string& group) {
  const int64_t channels = moments.size(2);
  const Tensor array = new_empty(moments, {5, channels}), count = new_empty(moments, {1});
  norm_array({moments, std::nullopt, tokens}, {}, array, count);
  return call_operator<2>("ceit::_leff_gather_moments", rows_of(array, 0, 2), count, group);
}

// The array of a layer's norm, without an element where there is none. `count` receives the tokens of batch statistics.
Tensor norm_of(const Layer& layer, const OptionalTensor& moments, int64_t tokens, const std::string& group,
               const Tensor& count) {
  if (layer.mode == Mode::none) return new_empty(count, {0});
  const Tensor array = new_empty(count, {5, layer.channels()});
  const NormVectors vectors{layer.running_mean, layer.running_var, layer.norm_weight, layer.norm_bias, layer.eps};
  if (layer.mode == Mode::frozen) {
    norm_array({}, vectors, array, std::nullopt);
  } else if (group.empty()) {
    norm_array({moments, std::nullopt, tokens}, vectors, array, count);
  } else {
    const auto [everyone, counts] = gather(*moments, tokens, group);
    norm_array({everyone, counts, 0}, vectors, array, count);
  }
  return array;
}

// The sum of a (images, rows, columns) over the images, transposed: (columns, rows).
template <class Acc>
Tensor summed_and_transposed(const Tensor& parts) {
  const int64_t size = parts.size(1) * parts.size(2);
  const Tensor sum = new_empty(parts, {parts.size(1), parts.size(2)});
  const Acc* from = elements<Acc>("parts", parts, parts.numel());
  Acc* to = elements<Acc>("sum", sum, size);
  std::copy_n(from, size, to);
  for (int64_t image = 1; image < parts.size(0); ++image)
    for (int64_t i = 0; i < size; ++i) to[i] += from[image * size + i];
  return gemm::transposed(sum);
}

class Backward {
 public:
  Backward(const Tensor& x, std::array<Layer, kLayers> layers, const std::vector<Tensor>& saved, const Sizes& sizes,
           const std::string& group, ScalarType of_x, bool need_x, int64_t needs)
      : x_(x),
        layers_(layers),
        sizes_(sizes),
        group_(group),
        of_x_(of_x),
        need_x_(need_x),
        needs_(needs),
        count_(saved[6]) {
    z1_ = view(saved[0], {sizes.images, sizes.rows, sizes.hidden});
    z2_ = view(saved[1], {sizes.images, sizes.tokens, sizes.hidden});
    if (saved[2].numel()) z3_ = view(saved[2], {sizes.images, sizes.tokens, sizes.outputs});
    for (size_t i = 0; i < kLayers; ++i) norms_[i] = unless_empty(saved[3 + i]);
    gradients_.assign(1 + kLayers * kGradients, new_empty(x, {0}));
  }

  std::vector<Tensor> run(const Tensor& dout) {
    const bool below1 = need_x_ || needs(0, 0);
    const bool below2 = need_x_ || any_of(0) || needs(1, 0);
    const bool below3 = below2 || any_of(1);
    const bool wanted3 = below3 || needs(2, 0);
    OptionalTensor gradient3, gradient2, gradient1;
    const int64_t outputs_count = sizes_.images * sizes_.rows * sizes_.outputs;
    const Map g3{elements("dout", dout, outputs_count, x_.scalar_type()), sizes_.rows};
    const Map z3{data_of(z3_), sizes_.tokens};
    if (sums_of(2) || (wanted3 && norms_[2])) {
      const Tensor sums = sums_for(2);
      const SumsCall call{sizes_.of_outputs(), g3, z3, data_of(norms_[2]), sums.data_ptr()};
      run_tasks(kernels_.sums, call, channel_tiles(call.shape));
      gradient3 = coefficients(2, sums);
    }
    if (!wanted3) return gradients_;
    const Tensor dz3 = new_empty(x_, {sizes_.images, sizes_.tokens, sizes_.outputs});
    const Map to{dz3.data_ptr(), sizes_.tokens};
    const GradientCall call{sizes_.of_outputs(), g3, z3, data_of(gradient3), to, 0, sizes_.outputs};
    run_tasks(kernels_.gradient, call, row_tiles(call.shape, sizes_.tokens));
    // In a tensor with rows for prefix tokens, for the gradient of the first norm's result takes its place.
    const Tensor g = new_empty(x_, {sizes_.images, sizes_.rows, sizes_.hidden}), sums2 = sums_for(1);
    const Tensor dweight3 =
        contract_backward({dz3, layers_[2].matrix(), z2_, norms_[1], sizes_.second, needs(2, 0), g, sums2});
    if (needs(2, 0)) set_weight(2, dweight3);
    if (below2 || sums_of(1)) gradient2 = coefficients(1, sums2);
    if (!below2) return gradients_;
    const Tensor sums1 = sums_for(0);
    depthwise_backward(g, gradient2, sums1);
    if (below1 || sums_of(0)) gradient1 = coefficients(0, sums1);
    if (!below1) return gradients_;
    const auto [dx, dweight1] =
        expand_backward({g, z1_, gradient1, x_, layers_[0].matrix(), sizes_.tokens, of_x_, need_x_, needs(0, 0)});
    gradients_[0] = dx;
    if (needs(0, 0)) set_weight(0, dweight1);
    return gradients_;
  }

 private:
  bool needs(size_t layer, size_t which) const { return needs_ >> (layer * kGradients + which) & 1; }
  bool sums_of(size_t layer) const { return needs(layer, 1) || needs(layer, 2) || needs(layer, 3); }
  bool any_of(size_t layer) const { return needs(layer, 0) || sums_of(layer); }
  Tensor sums_for(size_t layer) const { return new_empty(count_, {x_.size(0), 2, layers_[layer].channels()}); }
  void set_weight(size_t layer, const Tensor& gradient) {
    gradients_[1 + layer * kGradients] = view(gradient, layers_[layer].weight.sizes());
  }

  // The gradient array of a layer's norm; leaves the gradients of its vectors behind that are wanted.
  OptionalTensor coefficients(size_t layer, const Tensor& sums) {
    const int64_t channels = sums.size(2);
    const bool of_batch = layers_[layer].mode == Mode::batch;
    const OptionalTensor count = of_batch ? OptionalTensor(count_) : std::nullopt;
    OptionalTensor gradient;
    if (norms_[layer]) gradient = new_empty(sums, {4, channels});
    const Tensor vectors = new_empty(sums, {3, channels});
    gradient_array(sums, norms_[layer], count, vectors, gradient);
    if (of_batch && !group_.empty()) {
      const auto [everyone] = call_operator<1>("ceit::_leff_sum_over_processes", sums, group_);
      gradient_array(everyone, norms_[layer], count, std::nullopt, gradient);
    }
    for (size_t i = 1; i < kGradients; ++i)
      if (needs(layer, i))
        gradients_[1 + layer * kGradients + i] = view(rows_of(vectors, int64_t(i) - 1, 1), {channels});
    return gradient;
  }

  void depthwise_backward(const Tensor& g, const OptionalTensor& gradient2, const Tensor& sums1) {
    const Tensor taps = gemm::transposed(layers_[1].matrix());
    OptionalTensor dtaps;
    if (needs(1, 0)) dtaps = new_empty(taps, {sizes_.images, taps.size(0), taps.size(1)});
    DepthwiseBackwardCall call{};
    call.shape = sizes_.of_hidden();
    call.height = sizes_.height, call.width = sizes_.width, call.side = sizes_.side;
    call.g = {g.data_ptr(), sizes_.rows}, call.z2 = {z2_.data_ptr(), sizes_.tokens};
    call.gradient2 = data_of(gradient2), call.taps = taps.data_ptr();
    call.z1 = {z1_.data_ptr(), sizes_.rows}, call.norm1 = data_of(norms_[0]), call.first = sizes_.first;
    call.sums1 = sums1.data_ptr(), call.grad_taps = data_of(dtaps);
    run_tasks(kernels_.depthwise_backward, call, channel_tiles(call.shape));
    if (!dtaps) return;
    const bool in_double = dtaps->scalar_type() == ScalarType::Double;
    set_weight(1, (in_double ? summed_and_transposed<double> : summed_and_transposed<float>)(*dtaps));
  }

  Tensor x_;
  const Kernels& kernels_ = chosen(dtype_index(x_));
  std::array<Layer, kLayers> layers_;
  Sizes sizes_;
  std::string group_;
  ScalarType of_x_;
  bool need_x_;
  int64_t needs_;
  Tensor count_, z1_, z2_;
  OptionalTensor z3_;
  std::array<OptionalTensor, kLayers> norms_;
  std::vector<Tensor> gradients_;
};

}  // namespace

std::vector<Tensor> train(Tensor x, std::vector<OptionalTensor> parameters, OptionalTensor residual, Tensor prefix,
                          std::vector<double> eps, std::vector<int64_t> modes, std::vector<int64_t> sizes,
                          std::string group, Tensor out) {
  const auto layers = layers_of(parameters, eps, modes);
  const Sizes size(x, sizes, layers);
  const Kernels& kernels = chosen(dtype_index(x));
  const Tensor like = torch::stable::to(new_empty(x, {0}), acc_dtype(x));
  const Tensor count = new_empty(like, {1});
  const auto moments_for = [&](const Layer& layer) {
    if (layer.mode != Mode::batch) return OptionalTensor();
    return OptionalTensor(new_empty(like, {size.images, 2, layer.channels()}));
  };
  const OptionalTensor moments1 = moments_for(layers[0]), moments2 = moments_for(layers[1]);
  const OptionalTensor moments3 = moments_for(layers[2]);
  const Tensor z1 = expand(x, layers[0].matrix(), layers[0].bias, size.tokens, moments1);
  const Tensor norm1 = norm_of(layers[0], moments1, size.tokens, group, count);
  const Tensor z2 = new_empty(x, {size.images, size.tokens, size.hidden}), taps = gemm::transposed(layers[1].matrix());
  DepthwiseCall depthwise{};
  depthwise.shape = size.of_hidden();
  depthwise.height = depthwise.bottom = size.height, depthwise.width = size.width, depthwise.side = size.side;
  depthwise.in = {z1.data_ptr(), size.rows}, depthwise.out = {z2.data_ptr(), size.tokens};
  depthwise.norm = data_of(unless_empty(norm1)), depthwise.first = size.first;
  depthwise.taps = elements("weight", taps, taps.numel(), like.scalar_type());
  depthwise.bias = elements("bias", layers[1].bias, size.hidden, like.scalar_type());
  depthwise.second = Activation::identity;
  depthwise.moments = data_of(moments2);
  run_tasks(kernels.depthwise, depthwise, channel_tiles(depthwise.shape));
  const Tensor norm2 = norm_of(layers[1], moments2, size.tokens, group, count);
  const Tensor z3 = contract(z2, unless_empty(norm2), size.second, layers[2].matrix(), layers[2].bias, moments3);
  const Tensor norm3 = norm_of(layers[2], moments3, size.tokens, group, count);
  FinishCall finish{};
  finish.shape = size.of_outputs();
  finish.z = {z3.data_ptr(), size.tokens}, finish.norm = data_of(unless_empty(norm3));
  const ScalarType dtype = out.scalar_type();
  const int64_t outputs = size.images * size.rows * size.outputs;
  finish.out = {elements("out", out, outputs, dtype), size.rows};
  // Without prefix tokens x is not read, whatever its width and dtype.
  if (size.rows > size.tokens) finish.x = {elements("prefix", prefix, outputs, dtype), size.rows};
  finish.residual = elements("residual", residual, outputs, dtype);
  const auto kernel = dtype == x.scalar_type() ? kernels.finish : kernels.finish_in_float;
  STD_TORCH_CHECK(kernel && (dtype == x.scalar_type() || dtype == ScalarType::Float), "out: unexpected dtype");
  run_tasks(kernel, finish, row_tiles(finish.shape, size.rows));
  const bool of_batch = moments1 || moments2 || moments3;
  return {view(z1, {size.images * size.rows, size.hidden}),
          view(z2, {size.images * size.tokens, size.hidden}),
          norm3.numel() ? view(z3, {size.images * size.tokens, size.outputs}) : new_empty(x, {0}),
          norm1,
          norm2,
          norm3,
          of_batch ? count : new_empty(like, {0})};
}

std::vector<Tensor> train_backward(Tensor dout, Tensor x, std::vector<OptionalTensor> parameters,
                                   std::vector<Tensor> saved, std::vector<int64_t> modes, std::vector<int64_t> sizes,
                                   std::string group, ScalarType of_x, bool need_x, int64_t needs) {
  STD_TORCH_CHECK(saved.size() == 7, "saved: expected what forward kept");
  const auto layers = layers_of(parameters, std::vector<double>(kLayers), modes);
  return Backward(x, layers, saved, Sizes(x, sizes, layers), group, of_x, need_x, needs).run(dout);
}

namespace {

std::vector<Tensor> train_backward_alike(Tensor dout, Tensor x, std::vector<OptionalTensor> parameters,
                                         std::vector<Tensor> saved, std::vector<int64_t> modes,
                                         std::vector<int64_t> sizes, std::string group, bool need_x, int64_t needs) {
  return train_backward(dout, x, parameters, saved, modes, sizes, group, x.scalar_type(), need_x, needs);
}

}  // namespace

}  // namespace ceit::leff

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_leff_train", TORCH_BOX(&ceit::leff::train));
  m.impl("_leff_train_backward", TORCH_BOX(&ceit::leff::train_backward_alike));
}
