"""Device code of a residual connection and the LayerNorm behind it.

With total = x + branch, hat = (total - mean) * rstd and out = weight * hat + bias, the gradient of a row is, for
g = weight * dout,

    dx = rstd * (g - mean(g) - hat * mean(g * hat)) + dtotal

where dtotal comes from everything else that the sum is used for; dx is the gradient of x and of branch alike.

Names: ``p_`` pointer, ``i_`` index of a program instance, ``o_`` offsets, ``m_`` mask, ``b_`` a tile in registers with
its shape behind it. A program instance holds whole rows, TILE_R at a time, whose C channels are padded to TILE_C. The
rows of tokens (B, N, C) follow one another; the first P of every N are the prefix, the last if LAST.
"""

import triton
import triton.language as tl

from ...common.kernel import kernel
from ...common.partials import store_rows, sum_by_last

__all__ = ["add_norm_backward_kernel", "add_norm_forward_kernel"]


@triton.jit
def _rows(m, M, C: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr):
    """Offsets of a tile from the start of row m, and its mask."""
    o_r, o_c = tl.arange(0, TILE_R), tl.arange(0, TILE_C)
    return o_r[:, None] * C + o_c[None, :], (m + o_r < M)[:, None] & (o_c < C)[None, :]  # [TILE_R, TILE_C]


@triton.jit
def _prefix_rows(m, N, P, STRIDE, LAST: tl.constexpr, C: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr):
    """Where the rows from m on that are prefix tokens are in (B, P, C), with images STRIDE apart, and which are."""
    o_m = m + tl.arange(0, TILE_R)
    o_t = o_m % N
    m_t = o_t < P
    if LAST:
        o_t -= N - P
        m_t = o_t >= 0
    offsets = (o_m // N).to(tl.int64) * STRIDE + o_t * C
    return offsets[:, None] + tl.arange(0, TILE_C)[None, :], m_t[:, None]


@kernel
def add_norm_forward_kernel(
    p_x, p_branch, p_weight, p_bias, p_total, p_out, p_prefix, p_mean, p_rstd, p_tickets, M, N, P, EPS: tl.constexpr,
    LAST: tl.constexpr, C: tl.constexpr, TICKETS: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """total = x + branch, where there is a branch, its LayerNorm, its prefix tokens and its statistics (M,). The
    counters (TICKETS,) of the backward kernel start at 0.
    """
    if p_tickets is not None:
        if tl.program_id(0) == 0:
            tl.store(p_tickets + tl.arange(0, TICKETS), tl.zeros((TICKETS,), dtype=tl.int32))
    m = tl.program_id(0) * TILE_R
    start = m.to(tl.int64) * C
    offsets, mask = _rows(m, M, C, TILE_R, TILE_C)
    b_total = tl.load(p_x + start + offsets, mask=mask, other=0.0).to(ACC)
    if p_branch is not None:
        b_total += tl.load(p_branch + start + offsets, mask=mask, other=0.0).to(ACC)
        # What is normalised is the rounded sum, which backward sees too.
        b_rounded = b_total.to(p_total.dtype.element_ty)
        tl.store(p_total + start + offsets, b_rounded, mask=mask)
        b_total = b_rounded.to(ACC)
    if p_prefix is not None:
        o_prefix, m_prefix = _prefix_rows(m, N, P, P * C, LAST, C, TILE_R, TILE_C)
        tl.store(p_prefix + o_prefix, b_total.to(p_prefix.dtype.element_ty), mask=mask & m_prefix)

    # Two passes over registers: with a mean far from zero a sum of squares would cancel.
    b_mean = tl.sum(b_total, axis=1) / C  # [TILE_R]
    b_centred = tl.where(mask, b_total - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_centred * b_centred, axis=1) / C + EPS)
    b_out = b_centred * b_rstd[:, None]
    o_c = tl.arange(0, TILE_C)
    if p_weight is not None:
        b_out *= tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(ACC)[None, :]
    if p_bias is not None:
        b_out += tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(ACC)[None, :]
    tl.store(p_out + start + offsets, b_out.to(p_out.dtype.element_ty), mask=mask)
    o_m = m + tl.arange(0, TILE_R)
    tl.store(p_mean + o_m, b_mean, mask=o_m < M)
    tl.store(p_rstd + o_m, b_rstd, mask=o_m < M)


@kernel
def add_norm_backward_kernel(
    p_dout, p_dtotal, p_dprefix, p_total, p_weight, p_mean, p_rstd, p_dx, p_partial, p_tickets, p_dweight, p_dbias,
    M, N, P, STRIDE, ROWS, T, GROUP, LAST: tl.constexpr, C: tl.constexpr, TILE_T: tl.constexpr, TILE_R: tl.constexpr,
    TILE_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx (M, C), and the gradients (C,) of weight and bias, where wanted, from partial sums (T, 2, C) of dout * hat and
    dout over ROWS rows each.
    """
    i_t = tl.program_id(0)
    o_c = tl.arange(0, TILE_C)
    b_dweight = tl.zeros((TILE_R, TILE_C), dtype=ACC)
    b_dbias = tl.zeros((TILE_R, TILE_C), dtype=ACC)
    for k in range(tl.cdiv(tl.minimum(ROWS, M - i_t * ROWS), TILE_R)):
        m = i_t * ROWS + k * TILE_R
        start = m.to(tl.int64) * C
        offsets, mask = _rows(m, M, C, TILE_R, TILE_C)
        o_m = m + tl.arange(0, TILE_R)
        b_mean = tl.load(p_mean + o_m, mask=o_m < M, other=0.0)
        b_rstd = tl.load(p_rstd + o_m, mask=o_m < M, other=0.0)
        b_total = tl.load(p_total + start + offsets, mask=mask, other=0.0).to(ACC)
        b_dout = tl.load(p_dout + start + offsets, mask=mask, other=0.0).to(ACC)
        # Beyond the last channel hat is not 0, but what it is multiplied by is.
        b_hat = (b_total - b_mean[:, None]) * b_rstd[:, None]
        if p_partial is not None:
            b_dweight += b_dout * b_hat
            b_dbias += b_dout
        if p_dx is not None:
            b_g = b_dout
            if p_weight is not None:
                b_g *= tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(ACC)[None, :]
            b_slope = tl.sum(b_g * b_hat, axis=1) / C
            b_offset = tl.sum(b_g, axis=1) / C
            b_dx = (b_g - b_offset[:, None] - b_hat * b_slope[:, None]) * b_rstd[:, None]
            if p_dtotal is not None:
                b_dx += tl.load(p_dtotal + start + offsets, mask=mask, other=0.0).to(ACC)
            if p_dprefix is not None:
                o_prefix, m_prefix = _prefix_rows(m, N, P, STRIDE, LAST, C, TILE_R, TILE_C)
                b_dx += tl.load(p_dprefix + o_prefix, mask=mask & m_prefix, other=0.0).to(ACC)
            tl.store(p_dx + start + offsets, b_dx.to(p_dx.dtype.element_ty), mask=mask)
    if p_partial is not None:
        m_c = o_c < C
        store_rows(p_partial, i_t, tl.sum(b_dweight, axis=0), tl.sum(b_dbias, axis=0), o_c, m_c, C)
        last, b_weight, b_bias = sum_by_last(p_partial, p_tickets, i_t, T, GROUP, o_c, m_c, C, TILE_T, TILE_C, ACC)
        if last:
            if p_dweight is not None:
                tl.store(p_dweight + o_c, b_weight.to(p_dweight.dtype.element_ty), mask=m_c)
            if p_dbias is not None:
                tl.store(p_dbias + o_c, b_bias.to(p_dbias.dtype.element_ty), mask=m_c)
