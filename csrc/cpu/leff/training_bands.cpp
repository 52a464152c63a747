#include "training_bands.h"

#include "../capability.h"
#include "../gemm/gemm.h"

namespace ceit::leff {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

namespace {

using torch::stable::new_empty;

// Rows whose hidden tokens, and hidden channels of an image's tokens, that stay in the second level of cache.
constexpr int64_t kBandRows = 3 * kRows;
constexpr int64_t kBandPanels = 3;
constexpr int64_t kBandChannels = kBandPanels * kBlock;

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

Tensor transposed(const Tensor& in) {
  Tensor out = new_empty(in, {in.size(1), in.size(0)});
  transpose(in, out);
  return out;
}

// out = in W^T + bias for the rows of an image, with their moments.
class Projection {
 public:
  Projection(const Tensor& weight, const OptionalTensor& bias, int64_t tokens, int64_t images,
             const OptionalTensor& moments)
      : packed_(new_empty(weight, {gemm::packed_bytes<float>(weight.size(0), weight.size(1))}, ScalarType::Byte)),
        call_(gemm::packed_call<float>(packed_.data_ptr(), weight.size(0), weight.size(1))),
        tokens_(tokens),
        moments_(gemm::floats("moments", moments, images * 2 * weight.size(0))) {
    gemm::pack<float>({gemm::floats("weight", weight, weight.numel()), call_.columns, call_.terms}, packed_.data_ptr());
    call_.shift = gemm::floats("bias", bias, weight.size(0));
    call_.a_stride = call_.terms, call_.out_stride = call_.columns;
  }
  void multiply(const float* a, float* out, int64_t begin, int64_t end) const {
    gemm::multiply(of(a, out), begin, end);
  }
  template <class Run>
  void take_moments(float* out, int64_t image, const Run& run) const {
    if (!moments_) return;
    run(gemm::panels_of(call_.columns), [&](int64_t begin, int64_t end) { take(out, image, begin, end); });
  }
  // Both for all rows, some channels at a time, of which the moments are taken before they leave the cache.
  template <class Run>
  void multiply_with_moments(const float* a, float* out, int64_t image, const Run& run) const {
    run(gemm::panels_of(call_.columns), [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; panel += kBandPanels) {
        const int64_t last = std::min(end, panel + kBandPanels);
        gemm::multiply(of(a, out), gemm::Range{0, tokens_}, gemm::Range{panel, last});
        if (moments_) take(out, image, panel, last);
      }
    });
  }

 private:
  static_assert(gemm::kColumns == kBlock, "a panel has the channels of a task");
  gemm::Call<float> of(const float* a, float* out) const {
    gemm::Call<float> rows = call_;
    rows.a = a, rows.out = out;
    return rows;
  }
  void take(float* out, int64_t image, int64_t begin, int64_t end) const {
    const int64_t columns = call_.columns;
    chosen(0).moments({{1, tokens_, columns}, {out, tokens_}, moments_ + image * 2 * columns}, begin, end);
  }

  Tensor packed_;
  gemm::Call<float> call_;
  int64_t tokens_;
  float* moments_;  // of all images, or null
};

// Adds to a matrix what threads beyond the first left at the start of their memory.
void add_others(const gemm::Memory& memory, const Tensor& sum) {
  float* to = gemm::floats("sum", sum, sum.numel());
  torch::stable::parallel_for(0, sum.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t thread = 1; thread < memory.threads; ++thread) {
      const float* from = memory.of(thread);
      for (int64_t i = begin; i < end; ++i) to[i] += from[i];
    }
  });
}

}  // namespace

bool has_bands(const Tensor& like) { return like.scalar_type() == ScalarType::Float; }

Tensor expand_by_bands(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t tokens,
                       const OptionalTensor& moments) {
  const int64_t images = x.size(0), rows = x.size(1), channels = x.size(2), hidden = weight.size(0);
  const int64_t prefix = rows - tokens;
  const Projection projection(weight, bias, tokens, images, moments);
  const Tensor z1 = new_empty(x, {images, rows, hidden});
  const float* from = gemm::floats("x", x, images * rows * channels);
  float* to = gemm::floats("z1", z1, images * rows * hidden);
  gemm::for_images(images, 0, [&](int64_t image, gemm::Place, auto run) {
    float* out = to + image * rows * hidden;
    std::fill_n(out, prefix * hidden, 0.0f);
    out += prefix * hidden;
    const float* in = from + (image * rows + prefix) * channels;
    projection.multiply_with_moments(in, out, image, run);
  });
  return z1;
}

Tensor contract_by_bands(const Tensor& z2, const OptionalTensor& norm, int64_t activation, const Tensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& moments) {
  const int64_t images = z2.size(0), tokens = z2.size(1), hidden = z2.size(2), outputs = weight.size(0);
  const Projection projection(weight, bias, tokens, images, moments);
  const Tensor z3 = new_empty(z2, {images, tokens, outputs});
  const float* from = gemm::floats("z2", z2, z2.numel());
  float* to = gemm::floats("z3", z3, z3.numel());
  const float* of_norm = gemm::floats("norm", norm, 5 * hidden);
  const Activation kind = checked_activation(activation);
  gemm::for_images(images, tokens * hidden, [&](int64_t image, gemm::Place place, auto run) {
    float* memory = place.memory;
    const float* in = from + image * tokens * hidden;
    float* out = to + image * tokens * outputs;
    run(blocks_of(tokens, kBandRows), [&](int64_t begin, int64_t end) {
      float* activated = memory + begin * kBandRows * hidden;
      for (int64_t row = begin * kBandRows; row < std::min(tokens, end * kBandRows); row += kBandRows) {
        const int64_t rows = std::min(kBandRows, tokens - row);
        const Map band{const_cast<float*>(in) + row * hidden, rows};
        const ActivateCall call{{1, rows, hidden}, band, of_norm, kind, {activated, rows}};
        chosen(0).activate(call, 0, blocks_of(rows, kRows));
        projection.multiply(activated, out + row * outputs, 0, rows);
      }
    });
    projection.take_moments(out, image, run);
  });
  return z3;
}

Tensor contract_backward_by_bands(const Tensor& dz3, const Tensor& weight, const Tensor& z2, const OptionalTensor& norm,
                                  int64_t activation, bool need_weight, const Tensor& g2, const Tensor& sums) {
  const int64_t images = z2.size(0), tokens = z2.size(1), hidden = z2.size(2), outputs = weight.size(0);
  const int64_t g_rows = g2.size(1);
  const float *dz = gemm::floats("dz3", dz3, images * tokens * outputs), *z = gemm::floats("z2", z2, z2.numel());
  float *g = gemm::floats("g2", g2, images * g_rows * hidden),
        *of_sums = gemm::floats("sums", sums, images * 2 * hidden);
  const float *of_weight = gemm::floats("weight", weight, outputs * hidden),
              *of_norm = gemm::floats("norm", norm, 5 * hidden);
  const Activation kind = checked_activation(activation);
  const Tensor dweight = new_empty(sums, {need_weight ? outputs : 0, hidden});
  float* of_dweight = gemm::floats("dweight", dweight, dweight.numel());
  const int64_t stride = turned_stride(tokens), turned_size = need_weight ? outputs * stride : 0;
  const int64_t parts = blocks_of(hidden, kBandChannels);
  const auto body = [&](int64_t image, gemm::Place place, auto run) {
    const float* in = dz + image * tokens * outputs;
    float *total = place.thread ? place.memory : of_dweight, *turned = place.memory + dweight.numel();
    float* scratch = turned + turned_size;
    float* out = g + (image * g_rows + g_rows - tokens) * hidden;
    if (need_weight) transpose_rows(in, tokens, outputs, turned);
    ActivateBackwardCall call{};
    call.shape = {1, tokens, hidden};
    call.g = call.dz = {out, tokens};
    call.z = {const_cast<float*>(z) + image * tokens * hidden, tokens};
    call.norm = of_norm, call.activation = kind;
    call.sums = of_sums + image * 2 * hidden;
    run(parts, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t channel = part * kBandChannels, channels = std::min(kBandChannels, hidden - channel);
        gemm::Call<float> product = gemm::call_of(of_weight + channel, hidden, outputs, channels);
        product.a = in, product.a_stride = outputs;
        product.out = out + channel, product.out_stride = hidden;
        gemm::multiply(product, 0, tokens);
        ActivateBackwardCall of_part = call;
        // Alone every part may have the same memory.
        float* activated = scratch + begin * tokens * kBandChannels;
        if (need_weight) of_part.part = {activated, channels, channel};
        chosen(0).activate_backward(of_part, channel / kBlock, blocks_of(channel + channels, kBlock));
        if (!need_weight) continue;
        gemm::Call<float> gradient = gemm::call_of(activated, channels, tokens, channels);
        gradient.a = turned, gradient.a_stride = stride;
        gradient.out = total + channel, gradient.out_stride = hidden, gradient.accumulate = !place.first;
        gemm::multiply(gradient, 0, outputs);
      }
    });
  };
  const int64_t scratch = need_weight ? parts * tokens * kBandChannels : 0;
  add_others(gemm::for_images(images, dweight.numel() + turned_size + scratch, body), dweight);
  return dweight;
}

std::tuple<Tensor, Tensor> expand_backward_by_bands(const Tensor& g1, const Tensor& z1, const OptionalTensor& gradient,
                                                    const Tensor& x, const Tensor& weight, int64_t tokens, bool need_x,
                                                    bool need_weight) {
  const int64_t images = x.size(0), rows = x.size(1), channels = x.size(2), hidden = weight.size(0);
  const int64_t prefix = rows - tokens;
  const float *g = gemm::floats("g1", g1, images * rows * hidden), *z = gemm::floats("z1", z1, images * rows * hidden);
  const float *from = gemm::floats("x", x, images * rows * channels),
              *of_weight = gemm::floats("weight", weight, weight.numel());
  const float* of_gradient = gemm::floats("gradient", gradient, 4 * hidden);
  const Tensor dx = need_x ? new_empty(x, {images, rows, channels}) : new_empty(x, {0});
  const Tensor dweight = new_empty(x, {need_weight ? channels : 0, hidden});  // transposed
  float* of_dweight = gemm::floats("dweight", dweight, dweight.numel());
  const int64_t stride = turned_stride(tokens), turned_size = need_weight ? channels * stride : 0;
  const int64_t parts = blocks_of(hidden, kBandChannels);
  const auto body = [&](int64_t image, gemm::Place place, auto run) {
    const int64_t start = image * rows + prefix;
    float *total = place.thread ? place.memory : of_dweight, *turned = place.memory + dweight.numel();
    float* scratch = turned + turned_size;
    if (need_weight) transpose_rows(from + start * channels, tokens, channels, turned);
    GradientCall call{};
    call.shape = {1, tokens, hidden};
    call.g = {const_cast<float*>(g) + start * hidden, tokens};
    if (gradient) call.z = {const_cast<float*>(z) + start * hidden, tokens};
    call.gradient = of_gradient;
    const auto memory_of = [&](int64_t part) { return scratch + part * tokens * kBandChannels; };
    const auto prepare = [&](int64_t part, float* dz1) {
      const int64_t channel = part * kBandChannels, count = std::min(kBandChannels, hidden - channel);
      GradientCall of_part = call;
      of_part.part = {dz1, count, channel};
      of_part.first = channel, of_part.last = channel + count;
      chosen(0).gradient(of_part, 0, blocks_of(tokens, kRows));
      if (!need_weight) return;
      gemm::Call<float> product = gemm::call_of(dz1, count, tokens, count);
      product.a = turned, product.a_stride = stride;
      product.out = total + channel, product.out_stride = hidden, product.accumulate = !place.first;
      gemm::multiply(product, 0, channels);
    };
    const auto finish = [&](int64_t part, const float* dz1, int64_t begin, int64_t end) {
      if (!need_x) return;
      const int64_t channel = part * kBandChannels, count = std::min(kBandChannels, hidden - channel);
      gemm::Call<float> product = gemm::call_of(of_weight + channel * channels, channels, count, channels);
      product.a = dz1, product.a_stride = count;
      product.out = gemm::floats("dx", dx, images * rows * channels) + start * channels, product.out_stride = channels;
      product.accumulate = part > 0;
      gemm::multiply(product, begin, end);
    };
    if (run.alone) {
      for (int64_t part = 0; part < parts; ++part) {
        prepare(part, scratch);
        finish(part, scratch, 0, tokens);
      }
    } else {
      run(parts, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) prepare(part, memory_of(part));
      });
      run(tokens, [&](int64_t begin, int64_t end) {
        for (int64_t part = 0; part < parts; ++part) finish(part, memory_of(part), begin, end);
      });
    }
    if (need_x)
      std::fill_n(gemm::floats("dx", dx, images * rows * channels) + image * rows * channels, prefix * channels, 0.0f);
  };
  const int64_t scratch = parts * tokens * kBandChannels;
  add_others(gemm::for_images(images, dweight.numel() + turned_size + scratch, body), dweight);
  return {dx, need_weight ? transposed(dweight) : dweight};
}

}  // namespace ceit::leff
