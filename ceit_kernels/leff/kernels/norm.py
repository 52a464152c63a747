"""The last norm in training, forward and backward: the kernels that take one pass over tokens and compute little."""

import triton
import triton.language as tl

from .blocks import gradient_rows, norm_gradient, norm_rows, normalize, store_rows, token_rows
from .inference import pass_prefix

__all__ = ["leff_norm_gradient_kernel", "leff_norm_kernel", "leff_norm_sums_kernel"]


@triton.jit
def leff_norm_kernel(
    p_z3, p_norm3, p_x, p_residual, p_out, M, B, HW, P, O: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, ACC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out (B, P + HW, O) = norm z3 (+ residual) from z3 (M, O); the prefix tokens are those of x."""
    i_m = tl.program_id(0)
    o_o = tl.program_id(1) * BO + tl.arange(0, BO)
    m_o = o_o < O
    if i_m >= tl.cdiv(M, BM):
        pass_prefix(p_x, p_residual, p_out, i_m - tl.cdiv(M, BM), o_o, B, HW, P, O, HAS_RESIDUAL, BM)
    else:
        o_r = tl.arange(0, BM)
        o_m = i_m * BM + o_r
        mask = (o_m < M)[:, None] & m_o[None, :]
        b_mean, b_scale, b_shift = norm_rows(p_norm3, o_o[None, :], m_o[None, :], O, True)
        p_block = p_z3 + (i_m * BM).to(tl.int64) * O
        b_z3 = tl.load(p_block + (o_r[:, None] * O + o_o[None, :]), mask=mask, other=0.0).to(ACC)
        b_out = normalize(b_z3, b_mean, b_scale, b_shift, True, EXACT)
        row, o_t = token_rows(o_m, i_m * BM, HW, P)
        offsets = row * O + (o_t[:, None] * O + o_o[None, :])
        if HAS_RESIDUAL:
            b_out += tl.load(p_residual + offsets, mask=mask, other=0.0).to(ACC)
        tl.store(p_out + offsets, b_out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def leff_norm_sums_kernel(
    p_dout, p_z3, p_norm3, p_partial, M, HW, P, ROWS, O: tl.constexpr, NORM: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Partial sums (T, 2, O) of the output's gradient and of it times (z3 - mean), over ROWS tokens each."""
    i_t = tl.program_id(0)
    o_o = tl.program_id(1) * BO + tl.arange(0, BO)
    m_o = o_o < O
    b_mean, _, _ = norm_rows(p_norm3, o_o[None, :], m_o[None, :], O, NORM)
    b_sum = tl.zeros((BM, BO), dtype=ACC)
    b_moment = tl.zeros((BM, BO), dtype=ACC)
    o_r = tl.arange(0, BM)
    for k in range(tl.cdiv(tl.minimum(ROWS, M - i_t * ROWS), BM)):
        m = i_t * ROWS + k * BM
        o_m = m + o_r
        mask = (o_m < M)[:, None] & m_o[None, :]
        row, o_t = token_rows(o_m, m, HW, P)
        b_dout = tl.load(p_dout + row * O + (o_t[:, None] * O + o_o[None, :]), mask=mask, other=0.0).to(ACC)
        b_sum += b_dout
        if NORM:
            p_block = p_z3 + m.to(tl.int64) * O
            b_z3 = tl.load(p_block + (o_r[:, None] * O + o_o[None, :]), mask=mask, other=0.0).to(ACC)
            b_moment += b_dout * (b_z3 - b_mean)
    store_rows(p_partial, i_t, tl.sum(b_sum, axis=0), tl.sum(b_moment, axis=0), o_o, m_o, O)


@triton.jit
def leff_norm_gradient_kernel(
    p_dout, p_z3, p_gradient3, p_dz3, M, HW, P, O: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, ACC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dz3 (M, O), the gradient of the last norm's input z3 (M, O), from that of the output."""
    m = tl.program_id(0) * BM
    o_r = tl.arange(0, BM)
    o_m = m + o_r
    o_o = tl.program_id(1) * BO + tl.arange(0, BO)
    m_o = o_o < O
    mask = (o_m < M)[:, None] & m_o[None, :]
    offsets = m.to(tl.int64) * O + (o_r[:, None] * O + o_o[None, :])
    row, o_t = token_rows(o_m, m, HW, P)
    b_dout = tl.load(p_dout + row * O + (o_t[:, None] * O + o_o[None, :]), mask=mask, other=0.0).to(ACC)
    b_z3 = tl.load(p_z3 + offsets, mask=mask, other=0.0).to(ACC)
    b_mean, b_a, b_b, b_c = gradient_rows(p_gradient3, o_o[None, :], m_o[None, :], O)
    b_dz3 = norm_gradient(b_dout, b_z3, b_mean, b_a, b_b, b_c, EXACT)
    tl.store(p_dz3 + offsets, b_dz3.to(p_dz3.dtype.element_ty), mask=mask)
