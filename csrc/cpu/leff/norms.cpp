// The arrays of LeFF's norms, of what the stages summed up. A few thousand numbers: one thread, in the order of the
// parts.
#include <cmath>
#include <vector>

#include "stages.h"

namespace ceit::leff {
namespace {

template <class Real>
const Real* data(const OptionalTensor& tensor) {
  return tensor ? static_cast<const Real*>(tensor->data_ptr()) : nullptr;
}

void check(const char* name, const OptionalTensor& tensor, int64_t elements, ScalarType type) {
  if (!tensor) return;
  STD_TORCH_CHECK(tensor->scalar_type() == type && tensor->is_contiguous() && tensor->numel() == elements, name,
                  ": expected ", elements, " contiguous elements of the type of the sums, got ", tensor->numel());
}

// Mean and centred sum of squares of parts together, about the mean of the first: a mean far from zero costs no digits.
template <class Real, class Count>
Real merge(const Real* moments, const Count& count, int64_t parts, int64_t channels, Real* mean, Real* squares) {
  Real total = 0;
  for (int64_t i = 0; i < parts; ++i) total += count(i);
  std::vector<Real> offset(size_t(channels), Real(0));
  for (int64_t i = 0; i < parts; ++i) {
    const Real* at = moments + i * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) offset[size_t(c)] += (at[c] - moments[c]) * count(i);
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] = moments[c] + offset[size_t(c)] / total, squares[c] = 0;
  for (int64_t i = 0; i < parts; ++i) {
    const Real* at = moments + i * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const Real difference = at[c] - mean[c];
      squares[c] += at[channels + c] + difference * difference * count(i);
    }
  }
  return total;
}

template <class Real>
void norm_array_of(const PartMoments& parts, const NormVectors& vectors, const Tensor& out,
                   const OptionalTensor& total) {
  const int64_t channels = out.size(1);
  Real* mean = static_cast<Real*>(out.data_ptr());
  Real *variance = mean + channels, *rstd = variance + channels, *scale = rstd + channels, *shift = scale + channels;
  if (parts.moments) {
    const Real* counts = data<Real>(parts.counts);
    const auto count_of = [&](int64_t part) { return counts ? counts[part] : Real(parts.tokens); };
    const Real count = merge(data<Real>(parts.moments), count_of, parts.moments->size(0), channels, mean, variance);
    for (int64_t c = 0; c < channels; ++c) variance[c] /= count;
    if (total) *static_cast<Real*>(total->data_ptr()) = count;
  } else {
    std::memcpy(mean, data<Real>(vectors.running_mean), size_t(channels) * sizeof(Real));
    std::memcpy(variance, data<Real>(vectors.running_variance), size_t(channels) * sizeof(Real));
  }
  const Real *weights = data<Real>(vectors.weight), *biases = data<Real>(vectors.bias);
  for (int64_t c = 0; c < channels; ++c) {
    rstd[c] = Real(1) / std::sqrt(variance[c] + Real(vectors.eps));
    scale[c] = weights ? rstd[c] * weights[c] : rstd[c];
    shift[c] = biases ? biases[c] : Real(0);
  }
}

template <class Real>
void gradient_array_of(const Tensor& sums, const OptionalTensor& norm, const OptionalTensor& count,
                       const OptionalTensor& vectors, const OptionalTensor& gradient) {
  const int64_t channels = sums.size(2);
  std::vector<Real> added(size_t(2 * channels), Real(0));
  for (int64_t i = 0; i < sums.size(0); ++i) {
    const Real* at = static_cast<const Real*>(sums.data_ptr()) + i * 2 * channels;
    for (int64_t c = 0; c < 2 * channels; ++c) added[size_t(c)] += at[c];
  }
  const Real *of_g = added.data(), *centred = of_g + channels, *array = data<Real>(norm);
  const Real *mean = array, *rstd = array ? array + 2 * channels : nullptr, *scale = array ? rstd + channels : nullptr;
  if (vectors) {
    Real* at = static_cast<Real*>(vectors->data_ptr());
    for (int64_t c = 0; c < channels; ++c) {
      // A norm of batch statistics takes the bias ahead of it away.
      at[c] = !array ? of_g[c] : count ? Real(0) : scale[c] * of_g[c];
      at[channels + c] = array ? centred[c] * rstd[c] : centred[c];
      at[2 * channels + c] = of_g[c];
    }
  }
  if (gradient) {
    Real* at = static_cast<Real*>(gradient->data_ptr());
    const Real share = count ? Real(1) / *data<Real>(count) : Real(0);
    for (int64_t c = 0; c < channels; ++c) {
      at[c] = mean[c];
      at[channels + c] = scale[c];
      at[2 * channels + c] = -scale[c] * rstd[c] * rstd[c] * (centred[c] * share);
      at[3 * channels + c] = -scale[c] * (of_g[c] * share);
    }
  }
}

}  // namespace

void norm_array(const PartMoments& parts, const NormVectors& vectors, const Tensor& out, const OptionalTensor& total) {
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == 5 && out.is_contiguous(),
                  "out: expected a contiguous (5, channels)");
  const ScalarType type = real_type(out);
  const int64_t channels = out.size(1);
  STD_TORCH_CHECK(parts.moments || (vectors.running_mean && vectors.running_variance),
                  "moments: expected those of parts, or running statistics");
  if (parts.moments) {
    check("moments", parts.moments, parts.moments->size(0) * 2 * channels, type);
    check("counts", parts.counts, parts.moments->size(0), type);
  }
  check("running_mean", vectors.running_mean, channels, type);
  check("running_variance", vectors.running_variance, channels, type);
  check("weight", vectors.weight, channels, type);
  check("bias", vectors.bias, channels, type);
  check("total", total, 1, type);
  (type == ScalarType::Double ? norm_array_of<double> : norm_array_of<float>)(parts, vectors, out, total);
}

void gradient_array(Tensor sums, OptionalTensor norm, OptionalTensor count, OptionalTensor vectors,
                    OptionalTensor gradient) {
  STD_TORCH_CHECK(sums.dim() == 3 && sums.size(1) == 2 && sums.is_contiguous(),
                  "sums: expected a contiguous (P, 2, channels)");
  STD_TORCH_CHECK(norm.has_value() || !gradient.has_value(), "gradient: expected with a norm");
  const ScalarType type = real_type(sums);
  const int64_t channels = sums.size(2);
  check("norm", norm, 5 * channels, type);
  check("count", count, 1, type);
  check("vectors", vectors, 3 * channels, type);
  check("gradient", gradient, 4 * channels, type);
  (type == ScalarType::Double ? gradient_array_of<double> : gradient_array_of<float>)(sums, norm, count, vectors,
                                                                                      gradient);
}

}  // namespace ceit::leff
