"""The last norm in training, forward and backward: the kernels that take one pass over tokens and compute little."""

import triton
import triton.language as tl

from ...common.kernel import kernel
from ...common.partials import store_rows, zero_tickets
from .kernels_common import norm_gradient, norm_rows, normalize, pass_prefix, token_rows
from .kernels_reduce import gradient_of_sums, sum_pairs

__all__ = ["leff_norm_gradient_kernel", "leff_norm_kernel", "leff_norm_sums_kernel"]


@kernel
def leff_norm_kernel(
    p_z3, p_norm3, p_x, p_residual, p_out, M, B, HW, P: tl.constexpr, O: tl.constexpr,
    TILE_M: tl.constexpr, TILE_O: tl.constexpr, ACC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out (B, P + HW, O) = norm z3 (+ residual) from z3 (M, O); the prefix tokens are those of x."""
    i_m = tl.program_id(0)
    o_o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    m_o = o_o < O
    if i_m >= tl.cdiv(M, TILE_M):
        pass_prefix(p_x, p_residual, p_out, i_m - tl.cdiv(M, TILE_M), o_o, B, HW, P, O, TILE_M)
    else:
        o_r = tl.arange(0, TILE_M)
        o_m = i_m * TILE_M + o_r
        mask = (o_m < M)[:, None] & m_o[None, :]
        b_norm = norm_rows(p_norm3, o_o[None, :], m_o[None, :], O)
        p_tile = p_z3 + (i_m * TILE_M).to(tl.int64) * O
        b_z3 = tl.load(p_tile + (o_r[:, None] * O + o_o[None, :]), mask=mask, other=0.0).to(ACC)
        b_out = normalize(b_z3, p_norm3, b_norm, EXACT)
        row, o_t = token_rows(o_m, i_m * TILE_M, HW, P)
        offsets = row * O + (o_t[:, None] * O + o_o[None, :])
        if p_residual is not None:
            b_out += tl.load(p_residual + offsets, mask=mask, other=0.0).to(ACC)
        tl.store(p_out + offsets, b_out.to(p_out.dtype.element_ty), mask=mask)


@kernel
def leff_norm_sums_kernel(
    p_dout, p_z3, p_norm3, p_partial, p_tickets, M, HW, ROWS, COUNTERS, P: tl.constexpr, O: tl.constexpr,
    TILE_M: tl.constexpr, TILE_O: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Partial sums (T, 2, O) of the output's gradient and of it times (z3 - mean), over ROWS tokens each. Tickets
    (COUNTERS,) of a later kernel start at 0.
    """
    i_t = tl.program_id(0)
    if p_tickets is not None:
        zero_tickets(p_tickets, COUNTERS, i_t + tl.program_id(1))
    o_o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    m_o = o_o < O
    b_norm = norm_rows(p_norm3, o_o[None, :], m_o[None, :], O)
    b_sum = tl.zeros((TILE_M, TILE_O), dtype=ACC)
    b_moment = tl.zeros((TILE_M, TILE_O), dtype=ACC)
    o_r = tl.arange(0, TILE_M)
    for k in range(tl.cdiv(tl.minimum(ROWS, M - i_t * ROWS), TILE_M)):
        m = i_t * ROWS + k * TILE_M
        o_m = m + o_r
        mask = (o_m < M)[:, None] & m_o[None, :]
        row, o_t = token_rows(o_m, m, HW, P)
        b_dout = tl.load(p_dout + row * O + (o_t[:, None] * O + o_o[None, :]), mask=mask, other=0.0).to(ACC)
        b_sum += b_dout
        if p_norm3 is not None:
            p_tile = p_z3 + m.to(tl.int64) * O
            b_z3 = tl.load(p_tile + (o_r[:, None] * O + o_o[None, :]), mask=mask, other=0.0).to(ACC)
            b_moment += b_dout * (b_z3 - b_norm[0])
    store_rows(p_partial, i_t, tl.sum(b_sum, axis=0), tl.sum(b_moment, axis=0), o_o, m_o, O)


@kernel
def leff_norm_gradient_kernel(
    p_dout, p_z3, p_norm3, p_partial, p_total, p_dz3, p_dbias, p_dnorm_weight, p_dnorm_bias, M, HW, T, ROWS,
    P: tl.constexpr, O: tl.constexpr, TILE_M: tl.constexpr, TILE_O: tl.constexpr, TILE_T: tl.constexpr,
    ACC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dz3 (M, O), the gradient of the last norm's input z3 (M, O), from that of the output and its partial sums
    (T, 2, O), ROWS tokens each; and what ``gradient_of_sums`` stores.
    """
    i_t = tl.program_id(0)
    o_o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    m_o = o_o < O
    # Every program instance takes the sums again: there are few parts, and they come from cache.
    b_sum, b_moment = sum_pairs(p_partial, T, o_o, m_o, O, TILE_T, TILE_O, ACC)
    b_mean, b_a, b_b, b_c = gradient_of_sums(
        b_sum, b_moment, p_norm3, p_total, p_dbias, p_dnorm_weight, p_dnorm_bias, o_o, m_o, m_o & (i_t == 0), O
    )
    b_gradient = b_mean[None, :], b_a[None, :], b_b[None, :], b_c[None, :]
    o_r = tl.arange(0, TILE_M)
    steps = tl.cdiv(tl.minimum(ROWS, M - i_t * ROWS), TILE_M)
    # The next tile's loads wait for memory while the current one is computed.
    b_next = _load_pair(p_dout, p_z3, i_t * ROWS, o_r, o_o, m_o, M, HW, P, O)
    for k in range(steps):
        b_dout, b_z3 = b_next
        m = i_t * ROWS + k * TILE_M
        b_next = _load_pair(p_dout, p_z3, m + TILE_M, o_r, o_o, m_o & (k + 1 < steps), M, HW, P, O)
        b_dz3 = norm_gradient(b_dout.to(ACC), b_z3.to(ACC), b_gradient, EXACT)
        offsets = m.to(tl.int64) * O + (o_r[:, None] * O + o_o[None, :])
        mask = (m + o_r < M)[:, None] & m_o[None, :]
        tl.store(p_dz3 + offsets, b_dz3.to(p_dz3.dtype.element_ty), mask=mask)


@triton.jit
def _load_pair(p_dout, p_z3, m, o_r, o_o, m_o, M, HW, P: tl.constexpr, O: tl.constexpr):
    """Tiles of dout and of z3 from image token m on."""
    mask = (m + o_r < M)[:, None] & m_o[None, :]
    row, o_t = token_rows(m + o_r, m, HW, P)
    b_dout = tl.load(p_dout + row * O + (o_t[:, None] * O + o_o[None, :]), mask=mask, other=0.0)
    return b_dout, tl.load(p_z3 + m.to(tl.int64) * O + (o_r[:, None] * O + o_o[None, :]), mask=mask, other=0.0)
