// An encoder block in training: one call forward and one backward. What is ahead of LeFF goes image by image, each on
// one thread; LeFF's norms take statistics of all images. The schemas are in ceit_kernels/block/training.py.
#include "../leff/training.h"

#include <array>
#include <tuple>

#include "../gemm/weight_gradient.h"
#include "parts.h"

namespace ceit::leff {
CEIT_DECLARE_TABLE(Kernels, kernels, 3)
}

namespace ceit::block {
namespace {

// Of the parameters those ahead of LeFF's: weights and biases of norm1, qkv, projection and norm2.
constexpr size_t kAttention = 8;
// Tensors that backward needs of what is ahead of LeFF.
constexpr size_t kSaved = 7;
// Columns of a weight's gradient that a task has.
constexpr int64_t kColumns = 3 * gemm::kPanelColumns;

// sizes: heads, both activations, height, width, and the modes of LeFF's norms (see leff::train).
struct Shape {
  int64_t images, rows, channels, heads;
  Numbers of_leff, modes;
  Shape(const Tensor& x, const Numbers& sizes, const Parameters& parameters, const Scalars& scalars) {
    STD_TORCH_CHECK(x.dim() == 3 && x.numel() > 0, "x: expected tokens (B, N, C)");
    STD_TORCH_CHECK(sizes.size() == 8, "sizes: expected 8 numbers, got ", sizes.size());
    STD_TORCH_CHECK(parameters.size() == kParameters, "parameters: expected ", kParameters, ", got ",
                    parameters.size());
    STD_TORCH_CHECK(scalars.size() == kScalars, "scalars: expected ", kScalars, ", got ", scalars.size());
    images = x.size(0), rows = x.size(1), channels = x.size(2), heads = sizes[0];
    STD_TORCH_CHECK(heads > 0 && channels % heads == 0, "heads: expected a divisor of ", channels, ", got ", heads);
    of_leff.assign(sizes.begin() + 1, sizes.begin() + 5), modes.assign(sizes.begin() + 5, sizes.end());
  }
  int64_t elements() const { return images * rows * channels; }
  int64_t prefix() const { return rows - of_leff[2] * of_leff[3]; }
};

Parameters parameters_of_leff(const Parameters& all) { return {all.begin() + kAttention, all.end()}; }

// What backward needs of what is ahead of LeFF: operands of GEMMs in T, tokens as they are.
template <class T, class Tokens>
struct Saved {
  using Acc = acc_t<T>;
  T *normalised1, *qkv, *attended, *normalised2;
  Tokens* total;
  Acc *statistics, *norms;  // of attention; mean and reciprocal deviation of each row of both norms
  static std::vector<Tensor> make(const Tensor& x, const Shape& s) {
    const auto rows = [&](int64_t channels) { return new_empty(x, {s.images, s.rows, channels}, kDtype<T>); };
    return {rows(s.channels),
            rows(3 * s.channels),
            rows(s.channels),
            new_empty(x, {s.images, s.rows, s.channels}),
            rows(s.channels),
            new_empty(x, {s.images, s.heads, s.rows, 2}, kDtype<Acc>),
            new_empty(x, {4, s.images * s.rows}, kDtype<Acc>)};
  }
  Saved(const std::vector<Tensor>& all, const Shape& s) {
    const int64_t count = s.elements();
    normalised1 = elements<T>("normalised1", all[0], count), qkv = elements<T>("qkv", all[1], 3 * count);
    attended = elements<T>("attended", all[2], count), total = elements<Tokens>("total", all[3], count);
    normalised2 = elements<T>("normalised2", all[4], count);
    statistics = elements<Acc>("statistics", all[5], s.images * s.heads * s.rows * 2);
    norms = elements<Acc>("norms", all[6], 4 * s.images * s.rows);
  }
};

// out = factor * x, + rest where there is any; x may be out.
template <class T>
void scale(const T* x, T factor, const T* rest, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = rest ? factor * x[i] + rest[i] : factor * x[i];
}

// Of each image, where there is a factor for each.
template <class T>
void scale_images(const Tensor& x, const T* factors, const T* rest, const Shape& s, const Tensor& out) {
  const T* from = elements<T>("x", x, s.elements());
  T* to = elements<T>("out", out, s.elements());
  const int64_t size = s.rows * s.channels;
  torch::stable::parallel_for(0, s.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      scale(from + i * size, factors[i], rest ? rest + i * size : nullptr, size, to + i * size);
  });
}

// norm2(x + factor * attention(norm1(x))), and the sum; the norm of the tokens that pass LeFF as they are in `out`.
template <class T, class Tokens>
void attend_and_norm(const Attention<T, Tokens>& block, const Shape& s, const Tokens* x, const Tokens* factors,
                     const Saved<T, Tokens>& to, Tokens* out) {
  const int64_t rows = s.rows, channels = s.channels, all_rows = s.images * rows;
  gemm::for_images(s.images, 2 * channels * int64_t(sizeof(Tokens)), [&](int64_t image, gemm::Place place, auto run) {
    const int64_t first = image * rows, at = first * channels;
    acc_t<T>* norms = to.norms + first;
    run(rows, [&](int64_t begin, int64_t end) {
      block.norm1(x + at, to.normalised1 + at, begin, end, norms, norms + all_rows);
      gemm::multiply(gemm::call_of<T, T>(block.qkv, to.normalised1 + at, to.qkv + 3 * at), begin, end);
    });
    attend(block, 1, rows, rows, channels, to.qkv + 3 * at, to.attended + at, run, to.statistics + 2 * first * s.heads);
    auto projection = gemm::call_of<T, Tokens>(block.projection, to.attended + at, to.total + at, x + at);
    if (factors) {
      auto *factor = static_cast<Tokens*>(place.memory), *shift = factor + channels;
      std::fill_n(factor, channels, factors[image]);
      scale(projection.shift, factors[image], static_cast<const Tokens*>(nullptr), channels, shift);
      projection.scale = factor, projection.shift = shift;
    }
    run(rows, [&](int64_t begin, int64_t end) {
      gemm::multiply(projection, begin, end);
      block.norm2(to.total + at, to.normalised2 + at, begin, end, norms + 2 * all_rows, norms + 3 * all_rows);
      block.norm2(to.total + at, out + at, std::min(begin, s.prefix()), std::min(end, s.prefix()));
    });
  });
}

// The gradients of weight and bias of a LayerNorm, from what tiles of rows of each image add to them.
template <class T>
class NormBackward {
 public:
  NormBackward(const Tensor& like, const Shape& s, const OptionalTensor& weight, const T* statistics)
      : tiles_(ceil_div(s.rows, add_norm::kTileRows)),
        channels_(s.channels),
        partial_(new_empty(like, {s.images * tiles_, 2, s.channels})),
        weight_(elements<T>("norm.weight", weight, s.channels)),
        mean_(statistics),
        rstd_(statistics + s.images * s.rows) {}
  // The gradient of rows x of an image, whose norm has the gradient g, + rest, + that of the prefix; and, where it is
  // wanted, that times a factor.
  template <class Run, class Scaled = T>
  void operator()(int64_t image, int64_t rows, const T* x, const T* g, const T* rest, const T* prefix, T* grad,
                  const Run& run, Scaled* scaled = nullptr, T factor = 1) const {
    add_norm::BackwardCall call{};
    call.scaled = scaled, call.factor = factor;
    call.rows = call.tokens = rows, call.channels = channels_;
    call.grad_out = g, call.grad_total = rest, call.grad_prefix = prefix, call.prefix = prefix ? 1 : 0;
    call.total = x, call.weight = weight_, call.mean = mean_ + image * rows, call.rstd = rstd_ + image * rows;
    call.grad = grad, call.partial = static_cast<T*>(partial_.data_ptr()) + image * tiles_ * 2 * channels_;
    const add_norm::Kernels& kernels = add_norm::chosen(kIndex<T>);
    const auto kernel = std::is_same_v<T, Scaled> ? kernels.backward : kernels.backward_to_bf16;
    run(tiles_, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  }
  Tensor gradient(size_t which) const { return sum_of_parts(partial_, which); }

  // The sum (channels) of one row of parts (*, 2, channels).
  static Tensor sum_of_parts(const Tensor& parts, size_t which) {
    const int64_t channels = parts.size(2);
    const Tensor sum = new_empty(parts, {channels});
    const T* from = static_cast<const T*>(parts.data_ptr()) + int64_t(which) * channels;
    T* to = static_cast<T*>(sum.data_ptr());
    std::copy_n(from, channels, to);
    for (int64_t i = 1; i < parts.size(0); ++i)
      for (int64_t c = 0; c < channels; ++c) to[c] += from[i * 2 * channels + c];
    return sum;
  }

 private:
  int64_t tiles_, channels_;
  Tensor partial_;
  const T *weight_, *mean_, *rstd_;
};

// A linear layer: the gradients of its weight and bias, summed up image by image.
template <class T>
class LinearBackward {
 public:
  using Acc = acc_t<T>;
  // The gradient of the weight is that of g^T x, or of x^T g where the output is the wider.
  LinearBackward(const Tensor& like, const Shape& s, int64_t outputs, int64_t inputs, bool need_weight, bool need_bias,
                 gemm::Arena& counting)
      : rows_(s.rows),
        outputs_(outputs),
        inputs_(inputs),
        weight_(need_weight, like, std::min(outputs, inputs), std::max(outputs, inputs), s.rows, counting),
        sums_(new_empty(like, {need_bias ? s.images : 0, 2, outputs}, kDtype<Acc>)) {}
  template <class Run>
  void add(int64_t image, const gemm::Place& place, const T* g, const T* x, const Run& run) const {
    const bool wide = outputs_ > inputs_;
    const auto of_image = weight_.of_image(place, wide ? x : g);
    const int64_t columns = std::max(outputs_, inputs_);
    run(ceil_div(columns, kColumns), [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * kColumns; first < std::min(columns, end * kColumns); first += kColumns)
        of_image.add(first, std::min(kColumns, columns - first), (wide ? g : x) + first, columns);
    });
    if (sums_.numel() == 0) return;
    Acc* to = static_cast<Acc*>(sums_.data_ptr()) + image * 2 * outputs_;
    const leff::SumsCall call{{1, rows_, outputs_}, {const_cast<T*>(g), rows_}, {}, nullptr, to};
    run(leff::channel_tiles(call.shape),
        [&](int64_t begin, int64_t end) { leff::chosen(kIndex<T>).sums(call, begin, end); });
  }
  Tensor weight(const gemm::Memory& memory) const {
    const Tensor sum = weight_.take(memory);
    return outputs_ > inputs_ ? gemm::transposed(sum) : sum;
  }
  Tensor bias() const { return NormBackward<Acc>::sum_of_parts(sums_, 0); }

 private:
  int64_t rows_, outputs_, inputs_;
  gemm::WeightGradient<T> weight_;
  Tensor sums_;
};

// What has a gradient ahead of LeFF: from the gradients of norm2's result and of all that it is taken of.
template <class T, class Tokens>
struct AttentionBackward {
  const Shape& s;
  const Parameters& parameters;
  double attention_scale;
  const Tensor& x;
  const Tokens* factors;
  Saved<T, Tokens> saved;
  const Tokens *of_norm2, *of_total, *of_class;
  int64_t needs;

  bool wanted(size_t parameter) const { return needs >> parameter & 1; }

  // dx, and sets the gradients of the parameters that are wanted.
  Tensor run(Tensor* gradients) const {
    const int64_t rows = s.rows, channels = s.channels, size = rows * channels;
    const Tensor dx = new_empty(x, {s.images, rows, channels});
    const Tokens* in = elements<Tokens>("x", x, s.elements());
    Tokens* to = static_cast<Tokens*>(dx.data_ptr());
    gemm::Arena counting;
    const LinearBackward<T> of_qkv(x, s, 3 * channels, channels, wanted(2), wanted(3), counting);
    const LinearBackward<T> of_projection(x, s, channels, channels, wanted(4), wanted(5), counting);
    const NormBackward<Tokens> norm1(x, s, parameters[0], saved.norms);
    const NormBackward<Tokens> norm2(x, s, parameters[6], saved.norms + 2 * s.images * rows);
    const auto take_memory = [&](gemm::Arena& arena) {
      return std::tuple{arena.take<T>(3 * size), arena.take<T>(size), arena.take<T>(size), arena.take<Tokens>(size)};
    };
    const int64_t before = counting.bytes();
    take_memory(counting);
    const auto make = [&](gemm::Packer<T>& packer) {
      return std::array{packer.weight("qkv", channels, 3 * channels, true),
                        packer.weight("projection", channels, channels, true)};
    };
    const Parameters weights{parameters[2], parameters[4]};
    gemm::Memory memory{};
    gemm::with_prepacked<T>(weights, std::nullopt, make, [&](const std::array<gemm::Call<T>, 2>& matmuls) {
      memory = gemm::for_images(s.images, counting.bytes(), [&](int64_t image, gemm::Place place, auto run) {
        const int64_t at = image * size;
        gemm::Arena arena(static_cast<char*>(place.memory) + before);
        const auto [dqkv, dattended, scaled, of_norm1] = take_memory(arena);
        Tokens* dtotal = to + at;  // in the place of dx
        const T* g = scaled;
        const bool as_it_is = !factors && std::is_same_v<T, Tokens>;
        if constexpr (std::is_same_v<T, Tokens>) g = as_it_is ? dtotal : scaled;
        norm2(image, rows, saved.total + at, of_norm2 + at, of_total + at, nullptr, dtotal, run,
              as_it_is ? nullptr : scaled, factors ? factors[image] : Tokens(1));
        of_projection.add(image, place, g, saved.attended + at, run);
        const auto multiply = [&](const gemm::Product<T>& matmul, const T* a, auto* out) {
          run(rows, [&](int64_t begin, int64_t end) { gemm::multiply(gemm::call_of(matmul, a, out), begin, end); });
        };
        multiply(matmuls[1], g, dattended);
        attention::BackwardCall attention{};
        attention.shape = {1, rows, s.heads, channels / s.heads, rows};
        attention.scale = attention_scale;
        attention.grad_out = dattended, attention.qkv = saved.qkv + 3 * at, attention.grad_qkv = dqkv;
        attention.statistics = saved.statistics + image * s.heads * rows * 2;
        run(s.heads, [&](int64_t begin, int64_t end) { attention::chosen(kIndex<T>).backward(attention, begin, end); });
        of_qkv.add(image, place, dqkv, saved.normalised1 + at, run);
        multiply(matmuls[0], dqkv, of_norm1);
        norm1(image, rows, in + at, of_norm1, dtotal, of_class ? of_class + image * channels : nullptr, dtotal, run);
      });
    });
    for (size_t which = 0; which < 2; ++which) {
      if (wanted(which)) gradients[which] = norm1.gradient(which);
      if (wanted(6 + which)) gradients[6 + which] = norm2.gradient(which);
    }
    if (wanted(2)) gradients[2] = of_qkv.weight(memory);
    if (wanted(3)) gradients[3] = of_qkv.bias();
    if (wanted(4)) gradients[4] = of_projection.weight(memory);
    if (wanted(5)) gradients[5] = of_projection.bias();
    return dx;
  }
};

// Calls body(T(), Tokens()) with the type of the GEMMs and that of tokens.
template <class Body>
auto with_trained_dtypes(const Tensor& x, bool in_bfloat16, const Body& body) {
  const bool is_float = x.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(is_float || (x.scalar_type() == ScalarType::Double && !in_bfloat16),
                  "x: expected float32 or, without bfloat16, float64");
  if (in_bfloat16) return body(Bf16(), float());
  return is_float ? body(float(), float()) : body(double(), double());
}

// Fills out (B, N, C) of tokens x, and returns what backward needs. parameters and scalars: as of inference, without
// what is prepacked; all of the type of x, as sums and tokens are where GEMMs take bfloat16. factor1 and factor2 (B):
// of the two branches, of each image.
std::vector<Tensor> train(Tensor x, Parameters parameters, OptionalTensor factor1, OptionalTensor factor2,
                          Scalars scalars, Numbers sizes, bool in_bfloat16, Tensor out) {
  const Shape s(x, sizes, parameters, scalars);
  return with_trained_dtypes(x, in_bfloat16, [&](auto type, auto tokens) {
    using T = decltype(type);
    using Tokens = decltype(tokens);
    std::vector<Tensor> saved = Saved<T, Tokens>::make(x, s);
    const Saved<T, Tokens> to(saved, s);
    const auto* factors = elements<Tokens>("factor1", factor1, s.images);
    const auto make = [&](gemm::Packer<T>& packer) {
      return Attention<T, Tokens>(attention_sizes(s.channels, s.heads, scalars, 0), packer);
    };
    const Parameters own(parameters.begin(), parameters.begin() + kAttention);
    gemm::with_prepacked<T>(own, std::nullopt, make, [&](const Attention<T, Tokens>& block) {
      attend_and_norm(block, s, elements<Tokens>("x", x, s.elements()), factors, to,
                      elements<Tokens>("out", out, s.elements()));
    });
    const OptionalTensor residual = factor2 ? std::nullopt : OptionalTensor(saved[3]);
    const Scalars eps(scalars.begin() + 3, scalars.end());
    const auto of_leff =
        leff::train(saved[4], parameters_of_leff(parameters), residual, out, eps, s.modes, s.of_leff, "", out);
    if (factor2) scale_images<Tokens>(out, elements<Tokens>("factor2", factor2, s.images), to.total, s, out);
    saved.insert(saved.end(), of_leff.begin(), of_leff.end());
    return saved;
  });
}

// The gradients of x and of the parameters that may have one, in their order; without an element unless they are
// wanted, which bits of `needs` say, and `need_x` of x. grad_class (B, 1, C): that of the first tokens of x, beside
// what they do in the block. The rest is as for `train`, and what it returned.
std::vector<Tensor> train_backward(Tensor grad_out, OptionalTensor grad_class, Tensor x, Parameters parameters,
                                   OptionalTensor factor1, OptionalTensor factor2, std::vector<Tensor> saved,
                                   Scalars scalars, Numbers sizes, bool in_bfloat16, bool need_x, int64_t needs) {
  const Shape s(x, sizes, parameters, scalars);
  STD_TORCH_CHECK(saved.size() == kSaved + 7, "saved: expected what forward kept");
  return with_trained_dtypes(x, in_bfloat16, [&](auto type, auto tokens) {
    using T = decltype(type);
    using Tokens = decltype(tokens);
    const Saved<T, Tokens> kept(saved, s);
    Tensor of_branch = grad_out;
    if (factor2) {
      of_branch = new_empty(grad_out, {s.images, s.rows, s.channels});
      scale_images<Tokens>(grad_out, elements<Tokens>("factor2", factor2, s.images), nullptr, s, of_branch);
    }
    const bool ahead = need_x || (needs & ((1 << kAttention) - 1));
    const std::vector<Tensor> of_leff(saved.begin() + kSaved, saved.end());
    const Tensor of_out = std::is_same_v<T, Tokens> ? of_branch : torch::stable::to(of_branch, kDtype<T>);
    const auto found = leff::train_backward(of_out, saved[4], parameters_of_leff(parameters), of_leff, s.modes,
                                            s.of_leff, "", kDtype<Tokens>, ahead, needs >> kAttention);
    std::vector<Tensor> gradients(1 + kAttention, new_empty(x, {0}));
    gradients.insert(gradients.end(), found.begin() + 1, found.end());
    if (!ahead) return gradients;
    Tokens* of_norm2 = elements<Tokens>("gradient", found[0], s.elements());
    const Tokens *branch = elements<Tokens>("grad_out", of_branch, s.elements()), *of_total = branch;
    if (factor2) of_total = elements<Tokens>("grad_out", grad_out, s.elements());
    // Tokens that pass LeFF as they are.
    for (int64_t image = 0; image < s.images; ++image)
      std::copy_n(branch + image * s.rows * s.channels, s.prefix() * s.channels,
                  of_norm2 + image * s.rows * s.channels);
    const auto* of_class = elements<Tokens>("grad_class", grad_class, s.images * s.channels);
    const auto* factors = elements<Tokens>("factor1", factor1, s.images);
    const AttentionBackward<T, Tokens> backward{s,    parameters, scalars[1], x,        factors,
                                                kept, of_norm2,   of_total,   of_class, needs};
    gradients[0] = backward.run(gradients.data() + 1);
    return gradients;
  });
}

}  // namespace
}  // namespace ceit::block

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_encoder_train", TORCH_BOX(&ceit::block::train));
  m.impl("_encoder_train_backward", TORCH_BOX(&ceit::block::train_backward));
}
