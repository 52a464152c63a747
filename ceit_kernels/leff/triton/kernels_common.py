"""What several kernels of LeFF do with a tile."""

import triton
import triton.language as tl

from ...common.activations import activate
from ...common.partials import store_rows

__all__ = [
    "ONE",
    "PLAIN",
    "compute_once",
    "gradient_rows",
    "load_operand",
    "norm_gradient",
    "norm_rows",
    "normalize",
    "pass_prefix",
    "scale_and_shift",
    "store_moments",
    "token_rows",
    "zeros",
]

ONE, PLAIN = tl.constexpr(1), tl.constexpr("plain")


@triton.jit
def token_rows(o_m, m, HW, P):
    """Rows of x and of the output that image tokens are: that of token m, in 64 bits, and the others from there."""
    first = m + (m // HW + 1) * P
    return first.to(tl.int64), o_m + (o_m // HW + 1) * P - first


@triton.jit
def norm_rows(p_norm, o_e, m_e, E: tl.constexpr):
    """Mean, scale and shift of a norm; without one nothing is read."""
    if p_norm is not None:
        b_mean = tl.load(p_norm + o_e, mask=m_e, other=0.0)
        b_scale = tl.load(p_norm + 3 * E + o_e, mask=m_e, other=0.0)
        b_shift = tl.load(p_norm + 4 * E + o_e, mask=m_e, other=0.0)
        return b_mean, b_scale, b_shift
    else:
        return 0.0, 1.0, 0.0


@triton.jit
def normalize(b_z, p_norm, b_norm, EXACT: tl.constexpr):
    """(z - mean) scale + shift, or z without a norm. A 16-bit z has no more digits than one multiply-add keeps."""
    b_mean, b_scale, b_shift = b_norm
    if p_norm is None:
        return b_z
    elif EXACT:
        return (b_z - b_mean) * b_scale + b_shift
    else:
        return b_z * b_scale + (b_shift - b_mean * b_scale)


@triton.jit
def gradient_rows(p_gradient, o_e, m_e, E: tl.constexpr):
    """Mean, a, b and c of the gradient of a norm's input."""
    b_mean = tl.load(p_gradient + o_e, mask=m_e, other=0.0)
    b_a = tl.load(p_gradient + E + o_e, mask=m_e, other=0.0)
    b_b = tl.load(p_gradient + 2 * E + o_e, mask=m_e, other=0.0)
    b_c = tl.load(p_gradient + 3 * E + o_e, mask=m_e, other=0.0)
    return b_mean, b_a, b_b, b_c


@triton.jit
def norm_gradient(b_g, b_z, b_gradient, EXACT: tl.constexpr):
    """a g + b (z - mean) + c: the gradient of a norm's input from that of its output, g, and its input, z."""
    b_mean, b_a, b_b, b_c = b_gradient
    if EXACT:
        return b_g * b_a + ((b_z - b_mean) * b_b + b_c)
    else:
        return b_g * b_a + (b_z * b_b + (b_c - b_mean * b_b))


@triton.jit
def load_operand(
    p_a, p_z, p_rows, offsets, mask, o_e, m_e,
    E: tl.constexpr, OPERAND: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile (tokens, E) of a GEMM's operand, computed while it is loaded.

    OPERAND is "plain" (a itself), "gradient" (of a norm's input z from that of its output, a; ``p_rows`` is its
    ``gradient`` array) or an activation (of a after its norm, whose ``norm`` array is ``p_rows``).
    """
    b_a = tl.load(p_a + offsets, mask=mask, other=0.0)
    if OPERAND == "gradient":
        b_gradient = gradient_rows(p_rows, o_e[None, :], m_e[None, :], E)
        b_z = tl.load(p_z + offsets, mask=mask, other=0.0)
        b_a = norm_gradient(b_a.to(ACC), b_z.to(ACC), b_gradient, EXACT)
    elif OPERAND != "plain":
        b_norm = norm_rows(p_rows, o_e[None, :], m_e[None, :], E)
        b_a = activate(normalize(b_a.to(ACC), p_rows, b_norm, EXACT), OPERAND, EXACT)
    if OPERAND == "plain":
        return b_a.to(COMPUTE)
    else:
        return compute_once(b_a.to(COMPUTE))


@triton.jit
def compute_once(b_a):
    """The tile as it is, for the ``tl.dot`` whose operand it becomes.

    The compiler would compute an operand in the layout in which the dot takes it, where each of eight warps has all
    of it. It does not look through a reduction, though this one is over one value and takes no instruction.
    """
    return tl.reduce(tl.expand_dims(b_a, len(b_a.shape)), len(b_a.shape), _only)


@triton.jit
def _only(b_value, b_other):
    return b_value


@triton.jit
def scale_and_shift(vectors, eps, o_e, m_e, TILE_E: tl.constexpr, ACC: tl.constexpr):
    """Of TILE_E channels the scale and the shift that a layer's bias and norm are behind its weight.

    The vectors are bias, norm_weight, norm_bias, running_mean and running_var; any may be None, and without running
    statistics there is no norm.
    """
    p_bias, p_norm_weight, p_norm_bias, p_mean, p_variance = vectors
    b_scale, b_shift = tl.full((TILE_E,), 1.0, dtype=ACC), tl.zeros((TILE_E,), dtype=ACC)
    if p_bias is not None:
        b_shift += tl.load(p_bias + o_e, mask=m_e, other=0.0).to(ACC)
    if p_mean is not None:
        b_variance = tl.load(p_variance + o_e, mask=m_e, other=1.0).to(ACC)
        b_scale = tl.rsqrt(b_variance + tl.full((TILE_E,), eps, dtype=ACC))
        if p_norm_weight is not None:
            b_scale *= tl.load(p_norm_weight + o_e, mask=m_e, other=0.0).to(ACC)
        b_shift = (b_shift - tl.load(p_mean + o_e, mask=m_e, other=0.0).to(ACC)) * b_scale
        if p_norm_bias is not None:
            b_shift += tl.load(p_norm_bias + o_e, mask=m_e, other=0.0).to(ACC)
    # Or every thread would load and compute the vectors for all the columns of the GEMM's tile that it holds.
    return compute_once(b_scale), compute_once(b_shift)


@triton.jit
def store_moments(p_partial, p_count, i_t, b_z, rows, o_e, m_e, first, E: tl.constexpr, ACC: tl.constexpr):
    """Mean and centred sum of squares of a tile (tokens, E) over its first rows, and how many they are."""
    TILE: tl.constexpr = b_z.shape[0]
    n = tl.minimum(rows, TILE).to(ACC)
    # A range of its own: one that others have too would take registers through their loops.
    m_z = (tl.arange(TILE, 2 * TILE) < rows + TILE)[:, None]
    b_mean = tl.sum(tl.where(m_z, b_z, 0.0), axis=0) / n
    b_centred = tl.where(m_z, b_z - b_mean[None, :], 0.0)
    store_rows(p_partial, i_t, b_mean, tl.sum(b_centred * b_centred, axis=0), o_e, m_e, E)
    if first:
        tl.store(p_count + i_t, n)


@triton.jit
def pass_prefix(p_x, p_residual, p_out, i_p, o_o, B, HW, P, O: tl.constexpr, TILE_P: tl.constexpr):
    """Copy a tile of TILE_P prefix tokens, which are as wide as the output."""
    o_p = i_p * TILE_P + tl.arange(0, TILE_P)
    offsets = (o_p // P * (HW + P) + o_p % P).to(tl.int64)[:, None] * O + o_o[None, :]
    mask = (o_p < B * P)[:, None] & (o_o < O)[None, :]
    b_prefix = tl.load(p_x + offsets, mask=mask, other=0.0).to(p_out.dtype.element_ty)
    if p_residual is not None:
        b_prefix += tl.load(p_residual + offsets, mask=mask, other=0.0).to(p_out.dtype.element_ty)
    tl.store(p_out + offsets, b_prefix, mask=mask)


@triton.jit
def zeros(TILE_R: tl.constexpr, TILE_N: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr):
    """A tuple of tiles to sum in."""
    b_zeros = ()
    for _ in tl.static_range(COUNT):
        b_zeros = b_zeros + (tl.zeros((TILE_R, TILE_N), dtype=ACC),)
    return b_zeros
