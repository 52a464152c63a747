// A residual connection with its LayerNorm, row by row: a row is in the first level of cache for all its passes.
#include "../vector.h"
#include "calls.h"

namespace ceit::add_norm {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

namespace {

// Calls body(channel, count) for every vector of a part of a row; only the last may be short.
template <class Real, class Body>
CEIT_INLINE void for_vectors(int64_t first, int64_t last, Body body) {
  constexpr int lanes = Lanes<Real>::count;
  int64_t c = first;
  for (; c + lanes <= last; c += lanes) body(c, lanes);
  if (c < last) body(c, int(last - c));
}

template <class Real>
CEIT_INLINE Real sum_of_lanes(Vec<Real> v) {
  constexpr int lanes = Lanes<Real>::count;
  Real values[lanes];
  std::memcpy(values, &v, sizeof v);
  for (int width = lanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  return values[0];
}

// Two sums over the channels of a row, of what add(channel, count, first, second) adds; lanes beyond `count` count too.
// Vectors are added up kChain at a time, or wide rows would lose digits.
template <class Real>
struct PairSum {
  static constexpr int64_t kChain = 64 * Lanes<Real>::count;
  Real first, second;
  template <class Add>
  CEIT_INLINE PairSum(int64_t channels, Add add) {
    auto firsts = splat(Real(0)), seconds = splat(Real(0));
    for (int64_t start = 0; start < channels; start += kChain) {
      const int64_t end = start + kChain < channels ? start + kChain : channels;
      auto a = splat(Real(0)), b = splat(Real(0));
      for_vectors<Real>(start, end, [&](int64_t c, int count) { add(c, count, a, b); });
      firsts += a;
      seconds += b;
    }
    first = sum_of_lanes<Real>(firsts);
    second = sum_of_lanes<Real>(seconds);
  }
};

// Zero in the lanes beyond `count`.
template <class Real>
CEIT_INLINE Vec<Real> without_rest(Vec<Real> v, int count) {
  if (count >= Lanes<Real>::count) return v;
  for (int i = count; i < Lanes<Real>::count; ++i) v[i] = Real(0);
  return v;
}

template <class T>
void forward(const ForwardCall& call, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const int64_t channels = call.channels;
  const Real *weight = static_cast<const Real*>(call.weight), *bias = static_cast<const Real*>(call.bias);
  const int64_t last = end * kRows < call.rows ? end * kRows : call.rows;
  for (int64_t row = begin * kRows; row < last; ++row) {
    const T* x = static_cast<const T*>(call.x) + row * channels;
    const T* branch = call.branch ? static_cast<const T*>(call.branch) + row * channels : nullptr;
    T* total = branch ? static_cast<T*>(call.total) + row * channels : nullptr;
    const T* source = branch ? total : x;
    const PairSum<Real> sum(channels, [&](int64_t c, int count, auto& a, auto&) {
      auto value = load(x + c, count);
      if (branch) {
        value += load(branch + c, count);
        store(total + c, value, count);
      }
      a += value;
    });
    const Real about = sum.first / Real(channels);
    // The rest that rounding left between this number and the mean is taken away below: a mean far from zero costs no
    // digits.
    const PairSum<Real> moments(channels, [&](int64_t c, int count, auto& a, auto& b) {
      const auto centred = without_rest<Real>(load(source + c, count) - about, count);
      a += centred;
      b += centred * centred;
    });
    const Real shift = moments.first / Real(channels);
    const Real variance = moments.second / Real(channels) - shift * shift;
    const Real rstd = Real(1) / std::sqrt(variance + Real(call.eps));
    T* out = static_cast<T*>(call.out) + row * channels;
    for_vectors<Real>(0, channels, [&](int64_t c, int count) {
      auto value = ((load(source + c, count) - about) - shift) * rstd;
      if (weight) value *= load(weight + c, count);
      if (bias) value += load(bias + c, count);
      store(out + c, value, count);
    });
    if (call.mean) static_cast<Real*>(call.mean)[row] = about + shift;
    if (call.rstd) static_cast<Real*>(call.rstd)[row] = rstd;
  }
}

template <class T>
void backward(const BackwardCall& call, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const int64_t channels = call.channels;
  const Real* weight = static_cast<const Real*>(call.weight);
  for (int64_t block = begin; block < end; ++block) {
    Real* partial = call.partial ? static_cast<Real*>(call.partial) + block * 2 * channels : nullptr;
    if (partial) std::memset(partial, 0, sizeof(Real) * size_t(2 * channels));
    const int64_t last = (block + 1) * kRows < call.rows ? (block + 1) * kRows : call.rows;
    for (int64_t row = block * kRows; row < last; ++row) {
      const T* grad_out = static_cast<const T*>(call.grad_out) + row * channels;
      const T* total = static_cast<const T*>(call.total) + row * channels;
      const Real mean = static_cast<const Real*>(call.mean)[row], rstd = static_cast<const Real*>(call.rstd)[row];
      const auto weighted = [&](int64_t c, int count) {
        const auto g = load(grad_out + c, count);
        return weight ? g * load(weight + c, count) : g;
      };
      const auto normalised = [&](int64_t c, int count) { return (load(total + c, count) - mean) * rstd; };
      const PairSum<Real> sums(channels, [&](int64_t c, int count, auto& a, auto& b) {
        const auto g = weighted(c, count), value = normalised(c, count);
        a += g;
        b += g * value;
        if (!partial) return;
        const auto unweighted = load(grad_out + c, count);
        store(partial + c, load(partial + c, count) + unweighted * value, count);
        store(partial + channels + c, load(partial + channels + c, count) + unweighted, count);
      });
      if (!call.grad) continue;
      const Real mean_g = sums.first / Real(channels), mean_product = sums.second / Real(channels);
      const T* rest = call.grad_total ? static_cast<const T*>(call.grad_total) + row * channels : nullptr;
      const int64_t image = row / call.tokens, token = row % call.tokens;
      const T* prefix = token < call.prefix
                            ? static_cast<const T*>(call.grad_prefix) + (image * call.prefix + token) * channels
                            : nullptr;
      T* grad = static_cast<T*>(call.grad) + row * channels;
      for_vectors<Real>(0, channels, [&](int64_t c, int count) {
        auto value = (weighted(c, count) - mean_g - normalised(c, count) * mean_product) * rstd;
        if (rest) value += load(rest + c, count);
        if (prefix) value += load(prefix + c, count);
        store(grad + c, value, count);
      });
    }
  }
}

}  // namespace

extern const Kernels kernels[3];
const Kernels kernels[3] = {
    {forward<float>, backward<float>}, {forward<Bf16>, backward<Bf16>}, {forward<double>, backward<double>}};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::add_norm
