#include "../capability.h"
#include "../gemm/packing.h"
#include "../gemm/weight_gradient.h"
#include "training.h"

namespace ceit::leff {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

namespace {

// Rows whose hidden tokens, and channels of an image's hidden tokens, that stay in the second level of cache.
constexpr int64_t kRows = 3 * kTileRows, kChannels = 3 * kTileChannels;
static_assert(gemm::kPanelColumns == kTileChannels, "a panel has the channels of a task");

// Channels of a part of the hidden ones, and the panels, or tiles, that they are.
struct Part {
  int64_t first, count;
  gemm::Range panels;
  Part(int64_t index, int64_t hidden)
      : first(index * kChannels),
        count(std::min(kChannels, hidden - first)),
        panels{first / kTileChannels, ceil_div(first + count, kTileChannels)} {}
};

template <class T, class Use>
void with_linear(const Tensor& weight, const OptionalTensor& bias, const Use& use) {
  gemm::with_linear<T>(weight, bias, std::nullopt, weight.size(0), weight.size(1), use);
}

// Backward: the product of what has its outputs as columns.
template <class T, class Use>
void with_transposed(const Tensor& weight, const Use& use) {
  const auto make = [&](gemm::Packer<T>& packer) {
    return packer.weight("weight", weight.size(1), weight.size(0), true);
  };
  gemm::with_prepacked<T>({weight}, std::nullopt, make, use);
}

// The moments of some tiles of an image's tokens (tokens, channels).
template <class T>
void take_moments(T* z, int64_t tokens, int64_t channels, gemm::Range tiles, acc_t<T>* moments) {
  chosen(kIndex<T>).moments({{1, tokens, channels}, {z, tokens}, moments}, tiles.begin, tiles.end);
}

template <class T>
Tensor expand_of(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t tokens,
                 const OptionalTensor& moments) {
  const int64_t images = x.size(0), rows = x.size(1), channels = x.size(2), hidden = weight.size(0);
  const int64_t prefix = rows - tokens;
  const Tensor z1 = new_empty(x, {images, rows, hidden});
  const T* from = elements<T>("x", x, images * rows * channels);
  T* to = elements<T>("z1", z1, images * rows * hidden);
  acc_t<T>* of_moments = elements<acc_t<T>>("moments", moments, images * 2 * hidden);
  with_linear<T>(weight, bias, [&](gemm::Call<T> linear) {
    gemm::for_images(images, 0, [&](int64_t image, gemm::Place, auto run) {
      T* out = to + image * rows * hidden;
      std::fill_n(out, prefix * hidden, T());
      gemm::Call<T> matmul = linear;
      matmul.a = from + (image * rows + prefix) * channels, matmul.out = out + prefix * hidden;
      run(ceil_div(hidden, kChannels), [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
          const Part part(index, hidden);
          gemm::multiply(matmul, gemm::Range{0, tokens}, part.panels);
          if (moments) take_moments(matmul.out, tokens, hidden, part.panels, of_moments + image * 2 * hidden);
        }
      });
    });
  });
  return z1;
}

template <class T>
Tensor contract_of(const Tensor& z2, const OptionalTensor& norm, Activation activation, const Tensor& weight,
                   const OptionalTensor& bias, const OptionalTensor& moments) {
  const int64_t images = z2.size(0), tokens = z2.size(1), hidden = z2.size(2), outputs = weight.size(0);
  const Tensor z3 = new_empty(z2, {images, tokens, outputs});
  T *from = elements<T>("z2", z2, z2.numel()), *to = elements<T>("z3", z3, z3.numel());
  const void* of_norm = elements<acc_t<T>>("norm", norm, 5 * hidden);
  acc_t<T>* of_moments = elements<acc_t<T>>("moments", moments, images * 2 * outputs);
  with_linear<T>(weight, bias, [&](gemm::Call<T> linear) {
    const int64_t bytes = tokens * hidden * int64_t(sizeof(T));
    gemm::for_images(images, bytes, [&](int64_t image, gemm::Place place, auto run) {
      T *in = from + image * tokens * hidden, *out = to + image * tokens * outputs;
      run(ceil_div(tokens, kRows), [&](int64_t begin, int64_t end) {
        gemm::Call<T> matmul = linear;
        // A thread takes the same memory for all its rows.
        T* activated = static_cast<T*>(place.memory) + begin * kRows * hidden;
        for (int64_t row = begin * kRows; row < std::min(tokens, end * kRows); row += kRows) {
          const int64_t rows = std::min(kRows, tokens - row);
          const ActivateCall call{{1, rows, hidden}, {in + row * hidden, rows}, of_norm, activation, {activated, rows}};
          chosen(kIndex<T>).activate(call, 0, row_tiles(call.shape, rows));
          matmul.a = activated, matmul.out = out + row * outputs;
          gemm::multiply(matmul, 0, rows);
        }
      });
      if (!moments) return;
      run(ceil_div(outputs, kTileChannels), [&](int64_t begin, int64_t end) {
        take_moments(out, tokens, outputs, {begin, end}, of_moments + image * 2 * outputs);
      });
    });
  });
  return z3;
}

template <class T>
Tensor contract_backward_of(const ContractBackward& c) {
  const int64_t images = c.z2.size(0), tokens = c.z2.size(1), hidden = c.z2.size(2), outputs = c.weight.size(0);
  const int64_t g_rows = c.g2.size(1), parts = ceil_div(hidden, kChannels);
  const T* dz3 = elements<T>("dz3", c.dz3, images * tokens * outputs);
  T *z2 = elements<T>("z2", c.z2, images * tokens * hidden), *g2 = elements<T>("g2", c.g2, images * g_rows * hidden);
  const void* norm = elements<acc_t<T>>("norm", c.norm, 5 * hidden);
  acc_t<T>* sums = elements<acc_t<T>>("sums", c.sums, images * 2 * hidden);
  gemm::Arena counting;
  const gemm::WeightGradient<T> gradient(c.need_weight, c.z2, outputs, hidden, tokens, counting);
  const int64_t before = counting.bytes();
  counting.take<T>(c.need_weight ? parts * tokens * kChannels : 0);
  gemm::Memory memory;
  with_transposed<T>(c.weight, [&](gemm::Call<T> linear) {
    memory = gemm::for_images(images, counting.bytes(), [&](int64_t image, gemm::Place place, auto run) {
      gemm::Call<T> matmul = linear;
      matmul.a = dz3 + image * tokens * outputs;
      matmul.out = g2 + (image * g_rows + g_rows - tokens) * hidden;
      const auto of_image = gradient.of_image(place, matmul.a);
      T* scratch = c.need_weight ? reinterpret_cast<T*>(static_cast<char*>(place.memory) + before) : nullptr;
      run(parts, [&](int64_t begin, int64_t end) {
        ActivateBackwardCall call{};
        call.shape = {1, tokens, hidden};
        call.g = {matmul.out, tokens}, call.z = {z2 + image * tokens * hidden, tokens};
        call.norm = norm, call.activation = c.activation;
        call.sums = sums + image * 2 * hidden;
        // A thread takes the same memory for all its parts.
        T* activated = scratch ? scratch + begin * tokens * kChannels : nullptr;
        for (int64_t index = begin; index < end; ++index) {
          const Part part(index, hidden);
          gemm::multiply(matmul, gemm::Range{0, tokens}, part.panels);
          call.activated = activated, call.first = part.first, call.stride = part.count;
          chosen(kIndex<T>).activate_backward(call, part.panels.begin, part.panels.end);
          of_image.add(part.first, part.count, activated, part.count);
        }
      });
    });
  });
  return gradient.take(memory);
}

template <class T, class Out>
std::tuple<Tensor, Tensor> expand_backward_of(const ExpandBackward& c) {
  const int64_t images = c.x.size(0), rows = c.x.size(1), channels = c.x.size(2), hidden = c.weight.size(0);
  const int64_t prefix = rows - c.tokens;
  T *g1 = elements<T>("g1", c.g1, images * rows * hidden), *z1 = elements<T>("z1", c.z1, images * rows * hidden);
  const T* x = elements<T>("x", c.x, images * rows * channels);
  const void* coefficients = elements<acc_t<T>>("gradient", c.gradient, 4 * hidden);
  const Tensor dx = new_empty(c.x, {c.need_x ? images : 0, rows, channels}, c.of_x);
  Out* to = elements<Out>("dx", dx, dx.numel());
  gemm::Arena counting;
  const gemm::WeightGradient<T> gradient(c.need_weight, c.x, channels, hidden, c.tokens, counting);  // transposed
  gemm::Memory memory;
  with_transposed<T>(c.weight, [&](gemm::Call<T> linear) {
    memory = gemm::for_images(images, counting.bytes(), [&](int64_t image, gemm::Place place, auto run) {
      const int64_t start = image * rows + prefix;
      T* dz1 = g1 + start * hidden;  // in the place of g1
      const auto of_image = gradient.of_image(place, x + start * channels);
      run(ceil_div(hidden, kChannels), [&](int64_t begin, int64_t end) {
        GradientCall call{};
        call.shape = {1, c.tokens, hidden};
        call.g = call.out = {dz1, c.tokens}, call.z = {z1 + start * hidden, c.tokens};
        call.gradient = coefficients;
        for (int64_t index = begin; index < end; ++index) {
          const Part part(index, hidden);
          call.first = part.first, call.last = part.first + part.count;
          if (coefficients) chosen(kIndex<T>).gradient(call, 0, row_tiles(call.shape, c.tokens));
          of_image.add(part.first, part.count, dz1 + part.first, hidden);
        }
      });
      if (!c.need_x) return;
      const auto matmul = gemm::call_of<T, Out>(linear, dz1, to + start * channels);
      run(c.tokens, [&](int64_t begin, int64_t end) { gemm::multiply(matmul, begin, end); });
      std::fill_n(to + image * rows * channels, prefix * channels, Out());
    });
  });
  const Tensor sum = gradient.take(memory);
  return {dx, c.need_weight ? gemm::transposed(sum) : sum};
}

}  // namespace

Tensor expand(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t tokens,
              const OptionalTensor& moments) {
  return with_dtype(x, [&](auto type) { return expand_of<decltype(type)>(x, weight, bias, tokens, moments); });
}

Tensor contract(const Tensor& z2, const OptionalTensor& norm, Activation activation, const Tensor& weight,
                const OptionalTensor& bias, const OptionalTensor& moments) {
  return with_dtype(
      z2, [&](auto type) { return contract_of<decltype(type)>(z2, norm, activation, weight, bias, moments); });
}

Tensor contract_backward(const ContractBackward& call) {
  return with_dtype(call.z2, [&](auto type) { return contract_backward_of<decltype(type)>(call); });
}

std::tuple<Tensor, Tensor> expand_backward(const ExpandBackward& call) {
  if (call.x.scalar_type() == ScalarType::BFloat16 && call.of_x == ScalarType::Float)
    return expand_backward_of<Bf16, float>(call);
  return with_dtype(call.x, [&](auto type) { return expand_backward_of<decltype(type), decltype(type)>(call); });
}

}  // namespace ceit::leff
