// Activations of vectors, with the names of torch.nn's.
#pragma once

#include "vector.h"

namespace ceit {
namespace CEIT_CAPABILITY {

template <class Acc>
struct WithSlope {
  Vec<Acc> value, slope;
};

// The normal distribution's density, and its tail beyond |x|.
struct Normal {
  Vec<float> density, tail;
};
CEIT_INLINE Normal normal(Vec<float> x) {
  const auto z = x < 0.0f ? -x : x;
  const auto bell = z > 13.0f ? splat(0.0f) : exponential(-0.5f * x * x);
  // Tail over bell is a polynomial of t, fitted for the least relative error, 1.2e-8, up to 13.
  const auto t = reciprocal<float>(1.0f + 0.265f * z);
  auto p = 0.0309110686f * t - 0.144654558f;
  p = p * t + 0.218670417f;
  p = p * t - 0.117315159f;
  p = p * t + 0.138594875f;
  p = p * t + 0.060045772f;
  p = p * t + 0.10276809f;
  p = p * t + 0.105237398f;
  p = p * t + 0.105742102f;
  return {0.398942280f * bell, p * t * bell};
}

// Below it the distribution is less than half a unit in the last place of 1, and the value 0 as PyTorch's; without the
// slope x would magnify what a sum leaves.
constexpr float kNoGelu = -5.42f;

// Without the slope: the distribution is 1/2 + x P(x^2) / Q(x^2), fitted for the least relative error, 1.3e-8, up
// to 5.4.
CEIT_INLINE Vec<float> gelu_value(Vec<float> x) {
  const auto bounded = larger<float>(smaller<float>(x, splat(5.4f)), splat(-5.4f));
  const auto s = bounded * bounded;
  auto p = 2.35904672e-8f * s + 6.32369894e-6f;
  p = p * s + 1.60698117e-4f;
  p = p * s + 4.62898165e-3f;
  p = p * s + 3.30297194e-2f;
  p = p * s + 3.98942275e-1f;
  auto q = 1.21980695e-6f * s + 7.11736904e-5f;
  q = q * s + 1.83867231e-3f;
  q = q * s + 2.81802871e-2f;
  q = q * s + 2.49459692e-1f;
  q = q * s + 1.0f;
  const auto distribution = 0.5f + bounded * p * reciprocal<float>(q);
  return x * (x < kNoGelu ? splat(0.0f) : distribution);
}
CEIT_INLINE Vec<double> gelu_value(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] *= 0.5 * std::erfc(-x[i] * 0.7071067811865475244);
  return x;
}

CEIT_INLINE WithSlope<float> gelu(Vec<float> x) {
  const Normal n = normal(x);
  const auto distribution = x < 0.0f ? n.tail : 1.0f - n.tail;
  return {x * (x < kNoGelu ? splat(0.0f) : distribution), distribution + x * n.density};
}
CEIT_INLINE WithSlope<double> gelu(Vec<double> x) {
  WithSlope<double> result;
  for (int i = 0; i < Lanes<double>::count; ++i) {
    const double distribution = 0.5 * std::erfc(-x[i] * 0.7071067811865475244);
    result.value[i] = x[i] * distribution;
    result.slope[i] = distribution + x[i] * 0.3989422804014326779 * std::exp(-0.5 * x[i] * x[i]);
  }
  return result;
}

template <class Acc>
CEIT_INLINE Vec<Acc> sigmoid(Vec<Acc> x) {
  const auto s = reciprocal<Acc>(Acc(1) + exponential(-x));
  return x < Acc(-87) ? splat(Acc(0)) : s;
}

template <Activation kind, class Acc>
CEIT_INLINE WithSlope<Acc> activate_with_slope(Vec<Acc> x) {
  if constexpr (kind == Activation::gelu) {
    return gelu(x);
  } else if constexpr (kind == Activation::gelu_tanh) {
    constexpr Acc a = Acc(1.5957691216057308), b = Acc(0.07135481627159521);
    const auto s = sigmoid<Acc>(x * (a + b * x * x));
    return {x * s, s + s * (Acc(1) - s) * x * (a + Acc(3) * b * x * x)};
  } else if constexpr (kind == Activation::silu) {
    const auto s = sigmoid<Acc>(x);
    return {x * s, s + s * (Acc(1) - s) * x};
  } else if constexpr (kind == Activation::relu) {
    return {x < Acc(0) ? splat(Acc(0)) : x, x > Acc(0) ? splat(Acc(1)) : splat(Acc(0))};
  } else if constexpr (kind == Activation::relu6) {
    const auto above = x < Acc(0) ? splat(Acc(0)) : x;
    // PyTorch's derivative is 0 at 0 and at 6.
    const auto below = x < Acc(6) ? splat(Acc(1)) : splat(Acc(0));
    return {above > Acc(6) ? splat(Acc(6)) : above, x > Acc(0) ? below : splat(Acc(0))};
  } else if constexpr (kind == Activation::hardswish) {
    const auto gate = smaller<Acc>(larger<Acc>(x + Acc(3), splat(Acc(0))), splat(Acc(6))) * (Acc(1) / Acc(6));
    // PyTorch's derivative is 0 at -3 and 1 at 3.
    const auto inner = x < Acc(3) ? x * (Acc(1) / Acc(3)) + Acc(0.5) : splat(Acc(1));
    return {x * gate, x <= Acc(-3) ? splat(Acc(0)) : inner};
  } else {
    return {x, splat(Acc(1))};
  }
}

template <Activation kind, class Acc>
CEIT_INLINE Vec<Acc> activate(Vec<Acc> x) {
  if constexpr (kind == Activation::gelu)
    return gelu_value(x);
  else
    return activate_with_slope<kind, Acc>(x).value;
}

template <Activation kind>
struct ActivationConstant {
  static constexpr Activation value = kind;
};

// Calls `body` with the activation as a constant of the compiler's, so that loops hold no switch.
template <class Body>
CEIT_INLINE void with_activation(Activation kind, Body body) {
  switch (kind) {
    case Activation::gelu: return body(ActivationConstant<Activation::gelu>());
    case Activation::gelu_tanh: return body(ActivationConstant<Activation::gelu_tanh>());
    case Activation::silu: return body(ActivationConstant<Activation::silu>());
    case Activation::relu: return body(ActivationConstant<Activation::relu>());
    case Activation::relu6: return body(ActivationConstant<Activation::relu6>());
    case Activation::hardswish: return body(ActivationConstant<Activation::hardswish>());
    case Activation::identity: return body(ActivationConstant<Activation::identity>());
  }
}

}  // namespace CEIT_CAPABILITY
}  // namespace ceit
