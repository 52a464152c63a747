"""The depthwise convolution in training, forward and backward.

A program instance slides down TILE_W columns of IMAGES images, for TILE_E channels. Its rows are tuples of vectors of
channels, one for each place: a shift along the row is another element of the tuple, so that every activation is
computed once, from one load, and no shared memory is used.
"""

import triton
import triton.language as tl

from ...common.activations import activate, activate_with_slope
from ...common.kernel import kernel
from ...common.partials import store_rows
from .kernels_common import ONE, gradient_rows, norm_gradient, norm_rows, normalize
from .kernels_reduce import gradient_by_last, norm_by_last

__all__ = ["leff_depthwise_backward_kernel", "leff_depthwise_kernel", "load_row", "load_taps", "outside"]


@kernel
def leff_depthwise_kernel(
    p_z1, p_norm1, p_weight2, p_bias, p_z2, p_partial, p_count, p_tickets, p_norm, p_total, p_norm_weight, p_norm_bias,
    p_running_mean, p_running_var, p_batches, momentum: tl.float64, B, H, P1, IMAGES, T, GROUP,
    W: tl.constexpr, E: tl.constexpr, KERNEL: tl.constexpr, ACTIVATION: tl.constexpr, EPS: tl.constexpr,
    TILE_W: tl.constexpr, TILE_E: tl.constexpr, TILE_T: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """z2 (M, E) = dw(act(norm z1)) + b_2 from z1 (B, P1 + HW, E) and weight2 (E, KERNEL^2); partial moments of z2, and
    with tickets ``norm_by_last``.
    """
    R: tl.constexpr = KERNEL // 2
    NX: tl.constexpr = (W + TILE_W - 1) // TILE_W
    NE: tl.constexpr = (E + TILE_E - 1) // TILE_E
    TILE_X: tl.constexpr = TILE_W + 2 * R
    # Places of a row that are loaded: without the margins where they are padding.
    FIRST: tl.constexpr = R if NX == 1 else 0
    LAST: tl.constexpr = W + R if NX == 1 else TILE_X
    i_e = tl.program_id(0) % NE
    i_t = tl.program_id(0) // NE
    i_g = i_t // NX
    o_x = i_t % NX * TILE_W  # the first column
    o_e = i_e * TILE_E + tl.arange(0, TILE_E)
    m_e = o_e < E
    b_norm = norm_rows(p_norm1, o_e, m_e, E)
    b_taps = load_taps(p_weight2, o_e, m_e, KERNEL * KERNEL, ACC)
    b_zero = tl.zeros((TILE_E,), dtype=ACC)
    b_bias = b_zero
    if p_bias is not None:
        b_bias += tl.load(p_bias + o_e, mask=m_e, other=0.0).to(ACC)

    b_total, b_squares, count = b_zero, b_zero, tl.zeros((), dtype=ACC)
    for i_b in range(i_g * IMAGES, tl.minimum(i_g * IMAGES + IMAGES, B)):
        # Sums of output rows that have not met all of their input rows yet.
        b_open = ()
        for _ in tl.static_range(2 * R * TILE_W):
            b_open = b_open + (b_bias,)
        # The next row's loads wait for memory while the current one is computed.
        i_1 = i_b * H * W + (i_b + 1) * P1 + o_x - R
        b_next = load_row(p_z1 + i_1.to(tl.int64) * E + o_e, m_e, o_x, FIRST, LAST, R, W, E)
        for y in range(0, H + R):
            b_row = b_next
            p_row = p_z1 + (i_1 + (y + 1) * W).to(tl.int64) * E + o_e
            b_next = load_row(p_row, m_e & (y + 1 < H), o_x, FIRST, LAST, R, W, E)
            b_a1 = ()
            for x in tl.static_range(TILE_X):
                if outside(x, W, R, NX):
                    b_a1 = b_a1 + (b_zero,)
                else:
                    valid = (y < H) & (o_x + x >= R) & (o_x + x < W + R)
                    b_act = activate(normalize(b_row[x - FIRST].to(ACC), p_norm1, b_norm, EXACT), ACTIVATION, EXACT)
                    b_a1 = b_a1 + (tl.where(valid, b_act, 0.0),)
            b_rows = ()
            for i in tl.static_range((2 * R + 1) * TILE_W):
                if i < 2 * R * TILE_W:
                    b_z2 = b_open[i]
                else:
                    b_z2 = b_bias
                for j in tl.static_range(KERNEL):
                    if not outside(i % TILE_W + j, W, R, NX):
                        b_z2 += b_a1[i % TILE_W + j] * b_taps[(2 * R - i // TILE_W) * KERNEL + j]
                b_rows = b_rows + (b_z2,)
            b_open = b_rows[TILE_W:]

            if y >= R:
                p_row2 = p_z2 + ((i_b * H + y - R) * W + o_x).to(tl.int64) * E + o_e
                b_sum = b_zero
                for x in tl.static_range(TILE_W):
                    inside = o_x + x < W
                    b_out = b_rows[x].to(COMPUTE)
                    tl.store(p_row2 + x * E, b_out, mask=m_e & inside)
                    b_sum += tl.where(inside, b_out.to(ACC), 0.0)
                if p_partial is not None:
                    # Chan's rule: the moments so far, and those of a row about its own mean.
                    n = tl.minimum(W - o_x, TILE_W).to(ACC)
                    b_row_mean = b_sum / n
                    b_row_squares = b_zero
                    for x in tl.static_range(TILE_W):
                        b_centred = tl.where(o_x + x < W, b_rows[x].to(COMPUTE).to(ACC) - b_row_mean, 0.0)
                        b_row_squares += b_centred * b_centred
                    b_delta = b_row_mean - b_total
                    b_squares += b_row_squares + b_delta * b_delta * (n * count / (count + n))
                    count += n
                    b_total += b_delta * (n / count)
    if p_partial is not None:
        store_rows(p_partial, i_t, b_total, b_squares, o_e, m_e, E)
        if p_tickets is not None:
            norm_by_last(
                p_partial, p_count, p_tickets, p_norm, p_total,
                (p_norm_weight, p_norm_bias, p_running_mean, p_running_var, p_batches, momentum),
                count, i_t, i_e, T, GROUP, EPS, E, ONE, TILE_T, TILE_E, ACC,
            )  # fmt: skip
        elif i_e == 0:
            tl.store(p_count + i_t, count)


@kernel
def leff_depthwise_backward_kernel(
    p_g2, p_z2, p_z1, p_gradient2, p_norm1, p_weight2, p_g1, p_taps_gradient, p_partial, p_tickets, p_total, p_gradient,
    p_dbias, p_dnorm_weight, p_dnorm_bias, B, H, P1, IMAGES, T, GROUP,
    W: tl.constexpr, E: tl.constexpr, KERNEL: tl.constexpr, ACTIVATION: tl.constexpr,
    TILE_W: tl.constexpr, TILE_E: tl.constexpr, TILE_T: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """g1 (M, E), the gradient of norm z1, from g2, that of norm z2, and z1 (B, P1 + HW, E); partial gradients of the
    taps (T, KERNEL^2, E), partial sums (T, 2, E) of g1 and of g1 (z1 - mean), and with tickets ``gradient_by_last``.
    """
    R: tl.constexpr = KERNEL // 2
    NX: tl.constexpr = (W + TILE_W - 1) // TILE_W
    NE: tl.constexpr = (E + TILE_E - 1) // TILE_E
    TILE_X: tl.constexpr = TILE_W + 2 * R
    i_t = tl.program_id(0) // NE
    o_x = i_t % NX * TILE_W
    i_g = i_t // NX
    o_e = tl.program_id(0) % NE * TILE_E + tl.arange(0, TILE_E)
    m_e = o_e < E
    b_norm = norm_rows(p_norm1, o_e, m_e, E)
    b_gradient = gradient_rows(p_gradient2, o_e, m_e, E)
    b_taps = load_taps(p_weight2, o_e, m_e, KERNEL * KERNEL, ACC)
    b_zero = tl.zeros((TILE_E,), dtype=ACC)
    b_dtaps = ()
    for _ in tl.static_range(KERNEL * KERNEL):
        b_dtaps = b_dtaps + (b_zero,)

    b_sum, b_moment = b_zero, b_zero
    for i_b in range(i_g * IMAGES, tl.minimum(i_g * IMAGES + IMAGES, B)):
        # The gradients of z2 in the rows above and below the current one, of which the lowest comes in the loop.
        b_dz2 = ()
        for _ in tl.static_range(2 * R * TILE_X):
            b_dz2 = b_dz2 + (b_zero,)
        for y in range(-R, H):
            p_row = ((i_b * H + y + R) * W + o_x - R).to(tl.int64) * E + o_e
            for x in tl.static_range(TILE_X):
                if outside(x, W, R, NX):
                    b_dz2 = b_dz2 + (b_zero,)
                else:
                    valid = (y + R < H) & (o_x + x >= R) & (o_x + x < W + R)
                    b_g2 = tl.load(p_g2 + p_row + x * E, mask=m_e & valid, other=0.0).to(ACC)
                    b_z2 = tl.load(p_z2 + p_row + x * E, mask=m_e & valid, other=0.0).to(ACC)
                    b_new = norm_gradient(b_g2, b_z2, b_gradient, EXACT)
                    b_dz2 = b_dz2 + (tl.where(valid, b_new, 0.0),)
            p_row1 = ((i_b * H + y) * W + o_x).to(tl.int64) * E + o_e
            p_in = p_z1 + ((i_b + 1) * P1).to(tl.int64) * E + p_row1
            b_row1 = ()
            for x in tl.static_range(TILE_W):
                b_row1 = b_row1 + (tl.load(p_in + x * E, mask=m_e & (y >= 0) & (o_x + x < W), other=0.0),)
            for x in tl.static_range(TILE_W):
                valid = (y >= 0) & (o_x + x < W)
                b_z1 = b_row1[x].to(ACC)
                b_input = normalize(b_z1, p_norm1, b_norm, EXACT)
                b_a1, b_slope = activate_with_slope(b_input, ACTIVATION, EXACT)
                b_a1 = tl.where(valid, b_a1, 0.0)
                b_da1 = b_zero
                b_sums = ()
                for k in tl.static_range(KERNEL * KERNEL):
                    # Tap k of output q met input q + k - R; so input x met output x - k + R.
                    if outside(x + 2 * R - k % KERNEL, W, R, NX):
                        b_sums = b_sums + (b_dtaps[k],)
                    else:
                        b_near = b_dz2[(2 * R - k // KERNEL) * TILE_X + x + 2 * R - k % KERNEL]
                        b_da1 += b_near * b_taps[k]
                        b_sums = b_sums + (b_dtaps[k] + b_near * b_a1,)
                b_dtaps = b_sums
                b_g1 = tl.where(valid, b_da1 * b_slope, 0.0).to(COMPUTE)
                tl.store(p_g1 + p_row1 + x * E, b_g1, mask=m_e & valid)
                b_sum += b_g1.to(ACC)
                b_moment += b_g1.to(ACC) * (b_z1 - b_norm[0])
            b_dz2 = b_dz2[TILE_X:]
    store_rows(p_partial, i_t, b_sum, b_moment, o_e, m_e, E)
    for k in tl.static_range(KERNEL * KERNEL):
        p_tap = p_taps_gradient + (i_t * (KERNEL * KERNEL) + k).to(tl.int64) * E + o_e
        tl.store(p_tap, b_dtaps[k], mask=m_e)
    if p_tickets is not None:
        gradient_by_last(
            p_partial, p_tickets, p_norm1, p_total, p_gradient, p_dbias, p_dnorm_weight, p_dnorm_bias,
            i_t, tl.program_id(0) % NE, T, GROUP, o_e, m_e, E, TILE_T, TILE_E, ACC,
        )  # fmt: skip


@triton.jit
def load_row(
    p_row, mask, o_x, FIRST: tl.constexpr, LAST: tl.constexpr, R: tl.constexpr, W: tl.constexpr, E: tl.constexpr
):
    """A tuple of places of a row with its margins."""
    b_row = ()
    for x in tl.static_range(FIRST, LAST):
        valid = (o_x + x >= R) & (o_x + x < W + R)
        b_row = b_row + (tl.load(p_row + x * E, mask=mask & valid, other=0.0),)
    return b_row


@triton.jit
def load_taps(p_weight, o_e, m_e, TAPS: tl.constexpr, ACC: tl.constexpr):
    """A tuple of the taps, each a vector of channels, from (E, TAPS)."""
    b_taps = ()
    for k in tl.static_range(TAPS):
        b_taps = b_taps + (tl.load(p_weight + o_e * TAPS + k, mask=m_e, other=0.0).to(ACC),)
    return b_taps


@triton.constexpr_function
def outside(x, W, R, NX):
    """Whether column x of a row with its margins is padding, as far as is known when compiling."""
    return NX == 1 and (x < R or x >= W + R)
