"""Activations inside Triton kernels."""

import triton
import triton.language as tl

__all__ = ["activate", "activate_with_slope"]


@triton.jit
def activate(b_x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """The activation of a tile, in the tile's dtype.

    ACTIVATION is "gelu", "gelu_tanh", "silu", "relu", "relu6", "hardswish" or "identity". Without EXACT, GELU is within
    2.6e-5 of erf's, a tenth of what a 16-bit result of size 1 is rounded by, for a third of the instructions.
    """
    if ACTIVATION == "gelu":
        if EXACT:
            return 0.5 * b_x * (1.0 + tl.erf(b_x * 0.7071067811865476))
        else:
            return b_x * _sigmoid2(_normal_odds(b_x))
    elif ACTIVATION == "gelu_tanh":
        return b_x * _sigmoid2(b_x * (2.302208198144325 + 0.1029432395800235 * b_x * b_x))
    elif ACTIVATION == "silu":
        return b_x * _sigmoid2(b_x * 1.4426950408889634)
    elif ACTIVATION == "relu":
        return tl.maximum(b_x, 0.0)
    elif ACTIVATION == "relu6":
        return tl.where(b_x < 0.0, 0.0, tl.where(b_x > 6.0, 6.0, b_x)).to(b_x.dtype)
    elif ACTIVATION == "hardswish":
        return b_x * tl.minimum(tl.maximum(b_x + 3.0, 0.0), 6.0) * (1.0 / 6.0)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        return b_x


@triton.jit
def activate_with_slope(b_x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """The activation of a tile and its derivative, with the accuracy of ``activate``."""
    if ACTIVATION == "gelu":
        if EXACT:
            b_cdf = 0.5 + 0.5 * tl.erf(b_x * 0.7071067811865476)
        else:
            b_cdf = _sigmoid2(_normal_odds(b_x))
        b_density = 0.3989422804014327 * tl.exp2(b_x * b_x * -0.7213475204444817)
        return b_x * b_cdf, b_cdf + b_x * b_density
    elif ACTIVATION == "gelu_tanh":
        b_sigmoid = _sigmoid2(b_x * (2.302208198144325 + 0.1029432395800235 * b_x * b_x))
        b_slope = b_x * (1.5957691216057308 + 0.21406444881780076 * b_x * b_x)
        return b_x * b_sigmoid, b_sigmoid + b_sigmoid * (1.0 - b_sigmoid) * b_slope
    elif ACTIVATION == "silu":
        b_sigmoid = _sigmoid2(b_x * 1.4426950408889634)
        return b_x * b_sigmoid, b_sigmoid + b_sigmoid * (1.0 - b_sigmoid) * b_x
    elif ACTIVATION == "relu":
        return tl.maximum(b_x, 0.0), tl.where(b_x > 0.0, 1.0, 0.0).to(b_x.dtype)
    elif ACTIVATION == "relu6":
        b_value = tl.where(b_x < 0.0, 0.0, tl.where(b_x > 6.0, 6.0, b_x)).to(b_x.dtype)
        # PyTorch's derivative is 0 at 0 and at 6.
        return b_value, tl.where((b_x > 0.0) & (b_x < 6.0), 1.0, 0.0).to(b_x.dtype)
    elif ACTIVATION == "hardswish":
        b_gate = tl.minimum(tl.maximum(b_x + 3.0, 0.0), 6.0) * (1.0 / 6.0)
        # PyTorch's derivative is 0 at -3 and 1 at 3.
        b_slope = tl.where(b_x <= -3.0, 0.0, tl.where(b_x < 3.0, b_x * (1.0 / 3.0) + 0.5, 1.0))
        return b_x * b_gate, b_slope.to(b_x.dtype)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        return b_x, tl.full(b_x.shape, 1.0, b_x.dtype)


@triton.jit
def _normal_odds(b_x):
    """The log-odds of the normal distribution over x, base 2: an even polynomial fitted for GELU's largest error."""
    # Beyond 6 the polynomial would turn down, where the result no longer depends on it.
    b_square = tl.minimum(b_x * b_x, 36.0)
    return b_x * (2.30111369 + b_square * (0.106782595 - b_square * 0.00101536985))


@triton.jit
def _sigmoid2(b_odds):
    """1 / (1 + 2^-odds). The square of a reciprocal root is one fast instruction where a division is ten."""
    b_root = tl.rsqrt(1.0 + tl.exp2(-b_odds))
    return b_root * b_root
