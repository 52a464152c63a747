// A residual connection with its LayerNorm, row by row: a row is in the first level of cache for all its passes.
#include "../vector.h"
#include "calls.h"

namespace ceit::add_norm {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

namespace {

// Two sums over the channels of a row, of what add(channel, count, first, second) adds; lanes beyond `count` count too.
// Vectors are added up kChain at a time, or wide rows would lose digits.
template <class Acc>
struct PairSum {
  static constexpr int64_t kChain = 64 * Lanes<Acc>::count;
  Acc first, second;
  template <class Add>
  CEIT_INLINE PairSum(int64_t channels, Add add) {
    auto firsts = splat(Acc(0)), seconds = splat(Acc(0));
    for (int64_t start = 0; start < channels; start += kChain) {
      const int64_t end = min_of(start + kChain, channels);
      auto a = splat(Acc(0)), b = splat(Acc(0));
      for_vectors<Acc>(start, end, [&](int64_t c, int count) { add(c, count, a, b); });
      firsts += a;
      seconds += b;
    }
    first = sum_of_lanes<Acc>(firsts);
    second = sum_of_lanes<Acc>(seconds);
  }
};

// Zero in the lanes beyond `count`.
template <class Acc>
CEIT_INLINE Vec<Acc> without_rest(Vec<Acc> v, int count) {
  if (count >= Lanes<Acc>::count) return v;
  for (int i = count; i < Lanes<Acc>::count; ++i) v[i] = Acc(0);
  return v;
}

template <class T, class Out = T>
void forward(const ForwardCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t channels = call.channels;
  const Acc *weight = static_cast<const Acc*>(call.weight), *bias = static_cast<const Acc*>(call.bias);
  const int64_t last = min_of(end * kTileRows, call.rows);
  for (int64_t row = begin * kTileRows; row < last; ++row) {
    const T* x = static_cast<const T*>(call.x) + row * channels;
    const T* branch = call.branch ? static_cast<const T*>(call.branch) + row * channels : nullptr;
    T* total = branch ? static_cast<T*>(call.total) + row * channels : nullptr;
    const T* source = branch ? total : x;
    const PairSum<Acc> sum(channels, [&](int64_t c, int count, auto& a, auto&) {
      auto value = load(x + c, count);
      if (branch) {
        store(total + c, value + load(branch + c, count), count);
        value = load(total + c, count);  // rounded, as the rest of the row is taken about the mean of these
      }
      a += value;
    });
    const Acc about = sum.first / Acc(channels);
    // The rest that rounding left between this number and the mean is taken away below: a mean far from zero costs no
    // digits.
    const PairSum<Acc> moments(channels, [&](int64_t c, int count, auto& a, auto& b) {
      const auto centred = without_rest<Acc>(load(source + c, count) - about, count);
      a += centred;
      b += centred * centred;
    });
    const Acc shift = moments.first / Acc(channels);
    const Acc variance = moments.second / Acc(channels) - shift * shift;
    const Acc rstd = Acc(1) / std::sqrt(variance + Acc(call.eps));
    Out* out = static_cast<Out*>(call.out) + row * channels;
    for_vectors<Acc>(channels, [&](int64_t c, int count) {
      auto value = ((load(source + c, count) - about) - shift) * rstd;
      if (weight) value *= load(weight + c, count);
      if (bias) value += load(bias + c, count);
      store(out + c, value, count);
    });
    if (call.mean) static_cast<Acc*>(call.mean)[row] = about + shift;
    if (call.rstd) static_cast<Acc*>(call.rstd)[row] = rstd;
  }
}

template <class T, class Scaled = T>
void backward(const BackwardCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t channels = call.channels;
  const Acc* weight = static_cast<const Acc*>(call.weight);
  for (int64_t tile = begin; tile < end; ++tile) {
    Acc* partial = call.partial ? static_cast<Acc*>(call.partial) + tile * 2 * channels : nullptr;
    if (partial) std::memset(partial, 0, sizeof(Acc) * size_t(2 * channels));
    const int64_t last = min_of((tile + 1) * kTileRows, call.rows);
    for (int64_t row = tile * kTileRows; row < last; ++row) {
      const T* grad_out = static_cast<const T*>(call.grad_out) + row * channels;
      const T* total = static_cast<const T*>(call.total) + row * channels;
      const Acc mean = static_cast<const Acc*>(call.mean)[row], rstd = static_cast<const Acc*>(call.rstd)[row];
      const auto weighted = [&](int64_t c, int count) {
        const auto g = load(grad_out + c, count);
        return weight ? g * load(weight + c, count) : g;
      };
      const auto normalised = [&](int64_t c, int count) { return (load(total + c, count) - mean) * rstd; };
      const PairSum<Acc> sums(channels, [&](int64_t c, int count, auto& a, auto& b) {
        const auto g = weighted(c, count), value = normalised(c, count);
        a += g;
        b += g * value;
        if (!partial) return;
        const auto unweighted = load(grad_out + c, count);
        store(partial + c, load(partial + c, count) + unweighted * value, count);
        store(partial + channels + c, load(partial + channels + c, count) + unweighted, count);
      });
      if (!call.grad) continue;
      const Acc mean_g = sums.first / Acc(channels), mean_centred = sums.second / Acc(channels);
      const T* rest = call.grad_total ? static_cast<const T*>(call.grad_total) + row * channels : nullptr;
      const int64_t image = row / call.tokens, token = row % call.tokens;
      const T* prefix = token < call.prefix
                            ? static_cast<const T*>(call.grad_prefix) + (image * call.prefix + token) * channels
                            : nullptr;
      T* grad = static_cast<T*>(call.grad) + row * channels;
      Scaled* scaled = call.scaled ? static_cast<Scaled*>(call.scaled) + row * channels : nullptr;
      for_vectors<Acc>(channels, [&](int64_t c, int count) {
        auto value = (weighted(c, count) - mean_g - normalised(c, count) * mean_centred) * rstd;
        if (rest) value += load(rest + c, count);
        if (prefix) value += load(prefix + c, count);
        store(grad + c, value, count);
        if (scaled) store(scaled + c, Acc(call.factor) * value, count);
      });
    }
  }
}

}  // namespace

extern const Kernels kernels[3] = {{forward<float>, backward<float>, forward<float, Bf16>, backward<float, Bf16>},
                                   {forward<Bf16>, backward<Bf16>, forward<Bf16>, backward<Bf16>},
                                   {forward<double>, backward<double>, nullptr, nullptr}};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::add_norm
