// A few thousand numbers: one thread, in the order of the parts.
#include <cmath>
#include <cstring>
#include <vector>

#include "training.h"

namespace ceit::leff {
namespace {

// Mean and centred sum of squares of parts together, about the mean of the first: a mean far from zero costs no digits.
template <class Acc, class Count>
Acc merge(const Acc* moments, const Count& count, int64_t parts, int64_t channels, Acc* mean, Acc* squares) {
  Acc total = 0;
  for (int64_t i = 0; i < parts; ++i) total += count(i);
  std::vector<Acc> offset(size_t(channels), Acc(0));
  for (int64_t i = 0; i < parts; ++i) {
    const Acc* at = moments + i * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) offset[size_t(c)] += (at[c] - moments[c]) * count(i);
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] = moments[c] + offset[size_t(c)] / total, squares[c] = 0;
  for (int64_t i = 0; i < parts; ++i) {
    const Acc* at = moments + i * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const Acc difference = at[c] - mean[c];
      squares[c] += at[channels + c] + difference * difference * count(i);
    }
  }
  return total;
}

template <class Acc>
void norm_array_of(const PartMoments& parts, const NormVectors& vectors, const Tensor& out,
                   const OptionalTensor& total) {
  const int64_t channels = out.size(1);
  Acc* mean = elements<Acc>("out", out, 5 * channels);
  Acc *variance = mean + channels, *rstd = variance + channels, *scale = rstd + channels, *shift = scale + channels;
  if (parts.moments) {
    const int64_t count_of_parts = parts.moments->size(0);
    const Acc* moments = elements<Acc>("moments", parts.moments, count_of_parts * 2 * channels);
    const Acc* counts = elements<Acc>("counts", parts.counts, count_of_parts);
    const auto count_of = [&](int64_t part) { return counts ? counts[part] : Acc(parts.tokens); };
    const Acc count = merge(moments, count_of, count_of_parts, channels, mean, variance);
    for (int64_t c = 0; c < channels; ++c) variance[c] /= count;
    if (total) *elements<Acc>("total", total, 1) = count;
  } else {
    STD_TORCH_CHECK(vectors.running_mean && vectors.running_variance, "moments: expected, or running statistics");
    const size_t bytes = size_t(channels) * sizeof(Acc);
    std::memcpy(mean, elements<Acc>("running_mean", vectors.running_mean, channels), bytes);
    std::memcpy(variance, elements<Acc>("running_variance", vectors.running_variance, channels), bytes);
  }
  const Acc* weights = elements<Acc>("weight", vectors.weight, channels);
  const Acc* biases = elements<Acc>("bias", vectors.bias, channels);
  for (int64_t c = 0; c < channels; ++c) {
    rstd[c] = Acc(1) / std::sqrt(variance[c] + Acc(vectors.eps));
    scale[c] = weights ? rstd[c] * weights[c] : rstd[c];
    shift[c] = biases ? biases[c] : Acc(0);
  }
}

template <class Acc>
void gradient_array_of(const Tensor& sums, const OptionalTensor& norm, const OptionalTensor& count,
                       const OptionalTensor& vectors, const OptionalTensor& gradient) {
  const int64_t channels = sums.size(2);
  std::vector<Acc> added(size_t(2 * channels), Acc(0));
  for (int64_t i = 0; i < sums.size(0); ++i) {
    const Acc* at = static_cast<const Acc*>(sums.data_ptr()) + i * 2 * channels;
    for (int64_t c = 0; c < 2 * channels; ++c) added[size_t(c)] += at[c];
  }
  const Acc *of_g = added.data(), *centred = of_g + channels, *mean = elements<Acc>("norm", norm, 5 * channels);
  const Acc *rstd = mean ? mean + 2 * channels : nullptr, *scale = mean ? rstd + channels : nullptr;
  if (vectors) {
    Acc* at = elements<Acc>("vectors", vectors, 3 * channels);
    for (int64_t c = 0; c < channels; ++c) {
      at[channels + c] = mean ? centred[c] * rstd[c] : centred[c];
      at[2 * channels + c] = of_g[c];
      // A norm of batch statistics takes the bias ahead of it away: 0, and NaN where the batch has one.
      at[c] = !mean ? of_g[c] : count ? Acc(0) * (at[channels + c] + of_g[c]) : scale[c] * of_g[c];
    }
  }
  if (gradient) {
    Acc* at = elements<Acc>("gradient", gradient, 4 * channels);
    const Acc total = count ? *elements<Acc>("count", count, 1) : Acc(0);
    for (int64_t c = 0; c < channels; ++c) {
      at[c] = mean[c];
      at[channels + c] = scale[c];
      // Frozen statistics do not depend on the image: a NaN in one leaves the others alone.
      at[2 * channels + c] = count ? -scale[c] * rstd[c] * rstd[c] * (centred[c] / total) : Acc(0);
      at[3 * channels + c] = count ? of_g[c] / total : Acc(0);
    }
  }
}

}  // namespace

void norm_array(const PartMoments& parts, const NormVectors& vectors, const Tensor& out, const OptionalTensor& total) {
  (acc_dtype(out) == ScalarType::Double ? norm_array_of<double> : norm_array_of<float>)(parts, vectors, out, total);
}

void gradient_array(const Tensor& sums, const OptionalTensor& norm, const OptionalTensor& count,
                    const OptionalTensor& vectors, const OptionalTensor& gradient) {
  STD_TORCH_CHECK(norm.has_value() || !gradient.has_value(), "gradient: expected with a norm");
  const bool in_double = acc_dtype(sums) == ScalarType::Double;
  (in_double ? gradient_array_of<double> : gradient_array_of<float>)(sums, norm, count, vectors, gradient);
}

}  // namespace ceit::leff
