"""What stands between a library's GEMMs in training beside the depthwise convolution: one pass over hidden channels."""

import triton.language as tl

from ...common.activations import activate_with_slope
from ...common.kernel import kernel
from ...common.partials import store_rows
from .kernels_common import ONE, norm_rows, normalize, token_rows
from .kernels_reduce import gradient_by_last, norm_by_last

__all__ = ["leff_moments_kernel", "leff_slope_kernel"]


@kernel
def leff_moments_kernel(
    p_z, p_partial, p_count, p_tickets, p_norm, p_total, p_norm_weight, p_norm_bias, p_running_mean, p_running_var,
    p_batches, momentum: tl.float64, M, HW, ROWS, GROUP,
    P: tl.constexpr, E: tl.constexpr, EPS: tl.constexpr, TILE_M: tl.constexpr, TILE_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Partial moments of z (B, P + HW, E) without the prefix, over ROWS tokens each; with tickets ``norm_by_last``."""
    i_t = tl.program_id(0)
    o_e = tl.program_id(1) * TILE_E + tl.arange(0, TILE_E)
    m_e = o_e < E
    o_r = tl.arange(0, TILE_M)
    b_n = tl.zeros((TILE_M,), dtype=ACC)
    b_means = tl.zeros((TILE_M, TILE_E), dtype=ACC)
    b_squares = tl.zeros((TILE_M, TILE_E), dtype=ACC)
    for k in range(tl.cdiv(tl.minimum(ROWS, M - i_t * ROWS), TILE_M)):
        m = i_t * ROWS + k * TILE_M
        m_m = m + o_r < M
        row, o_t = token_rows(m + o_r, m, HW, P)
        mask = m_m[:, None] & m_e[None, :]
        b_z = tl.load(p_z + row * E + (o_t[:, None] * E + o_e[None, :]), mask=mask, other=0.0).to(ACC)
        # Welford's rule, for every TILE_M-th token.
        b_delta = tl.where(mask, b_z - b_means, 0.0)
        b_means += b_delta / (k + 1)
        b_squares += b_delta * (b_z - b_means)
        b_n += m_m.to(ACC)
    n = tl.sum(b_n, axis=0)
    b_mean = tl.sum(b_n[:, None] * b_means, axis=0) / n
    b_centred = b_means - b_mean[None, :]
    b_squares += b_n[:, None] * b_centred * b_centred
    store_rows(p_partial, i_t, b_mean, tl.sum(b_squares, axis=0), o_e, m_e, E)
    if p_tickets is not None:
        # By 16 parts at a time four program instances would fill an SM's registers, by 8 six do as without.
        norm_by_last(
            p_partial, p_count, p_tickets, p_norm, p_total,
            (p_norm_weight, p_norm_bias, p_running_mean, p_running_var, p_batches, momentum),
            n, i_t, tl.program_id(1), tl.cdiv(M, ROWS), GROUP, EPS, E, ONE, TILE_M // 2, TILE_E, ACC,
        )  # fmt: skip
    elif tl.program_id(1) == 0:
        tl.store(p_count + i_t, n)


@kernel
def leff_slope_kernel(
    p_dh2, p_z2, p_norm2, p_g2, p_h2, p_partial, p_tickets, p_total, p_gradient, p_dbias, p_dnorm_weight, p_dnorm_bias,
    M, HW, ROWS, T, GROUP, P: tl.constexpr, E: tl.constexpr, ACTIVATION: tl.constexpr,
    TILE_M: tl.constexpr, TILE_E: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """g2 (M, E) = dh2 act'(norm z2), the gradient of norm z2, from dh2 (B, P + HW, E); where wanted h2 = act(norm z2);
    partial sums (T, 2, E) of g2 and of g2 (z2 - mean), over ROWS tokens each, and with tickets ``gradient_by_last``.
    """
    i_t = tl.program_id(0)
    o_e = tl.program_id(1) * TILE_E + tl.arange(0, TILE_E)
    m_e = o_e < E
    o_r = tl.arange(0, TILE_M)
    b_norm = norm_rows(p_norm2, o_e[None, :], m_e[None, :], E)
    b_sum = tl.zeros((TILE_M, TILE_E), dtype=ACC)
    b_moment = tl.zeros((TILE_M, TILE_E), dtype=ACC)
    for k in range(tl.cdiv(tl.minimum(ROWS, M - i_t * ROWS), TILE_M)):
        m = i_t * ROWS + k * TILE_M
        mask = (m + o_r < M)[:, None] & m_e[None, :]
        row, o_t = token_rows(m + o_r, m, HW, P)
        b_dh2 = tl.load(p_dh2 + row * E + (o_t[:, None] * E + o_e[None, :]), mask=mask, other=0.0).to(ACC)
        offsets = m.to(tl.int64) * E + (o_r[:, None] * E + o_e[None, :])
        b_z2 = tl.load(p_z2 + offsets, mask=mask, other=0.0).to(ACC)
        b_h2, b_slope = activate_with_slope(normalize(b_z2, p_norm2, b_norm, EXACT), ACTIVATION, EXACT)
        if p_h2 is not None:
            tl.store(p_h2 + offsets, b_h2.to(COMPUTE), mask=mask)
        b_out = (b_dh2 * b_slope).to(COMPUTE)
        tl.store(p_g2 + offsets, b_out, mask=mask)
        b_g2 = b_out.to(ACC)
        b_sum += b_g2
        b_moment += b_g2 * (b_z2 - b_norm[0])
    store_rows(p_partial, i_t, tl.sum(b_sum, axis=0), tl.sum(b_moment, axis=0), o_e, m_e, E)
    if p_tickets is not None:
        gradient_by_last(
            p_partial, p_tickets, p_norm2, p_total, p_gradient, p_dbias, p_dnorm_weight, p_dnorm_bias,
            i_t, tl.program_id(1), T, GROUP, o_e, m_e, E, TILE_M, TILE_E, ACC,
        )  # fmt: skip
