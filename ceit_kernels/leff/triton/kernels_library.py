"""Inference where a library computes the two pointwise GEMMs: the depthwise convolution and all that stands around it.

As in ``kernels_depthwise`` a program instance slides down TILE_W columns, and its rows are tuples of vectors of
channels. Nothing but the next row's loads waits for memory: they are issued before the current row is computed.
"""

import triton
import triton.language as tl

from ...common.activations import activate
from ...common.kernel import kernel
from ...common.partials import store_rows
from .kernels_common import scale_and_shift
from .kernels_depthwise import load_taps, outside

__all__ = ["leff_depthwise_inference_kernel"]


@kernel
def leff_depthwise_inference_kernel(
    p_z1, p_norm_weight1, p_norm_bias1, p_running_mean1, p_running_var1,
    p_weight2, p_bias2, p_norm_weight2, p_norm_bias2, p_running_mean2, p_running_var2, p_h2,
    p_norm_weight3, p_norm_bias3, p_running_mean3, p_running_var3, p_norm3,
    B, H, eps1: tl.float64, eps2: tl.float64, eps3: tl.float64,
    P: tl.constexpr, W: tl.constexpr, E: tl.constexpr, O: tl.constexpr, KERNEL: tl.constexpr,
    ACTIVATION1: tl.constexpr, ACTIVATION2: tl.constexpr,
    TILE_W: tl.constexpr, TILE_E: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """h2 (M, E) = act(norm dw(act(norm z1))) from z1 (B, P + HW, E) and weight2 (E, KERNEL^2).

    The program instances behind those of the images make the ``norm`` array of the last layer, if it has a norm.
    """
    R: tl.constexpr = KERNEL // 2
    NX: tl.constexpr = (W + TILE_W - 1) // TILE_W
    NE: tl.constexpr = (E + TILE_E - 1) // TILE_E
    TILE_X: tl.constexpr = TILE_W + 2 * R
    # Places of a row that are loaded: without the margins where they are padding.
    FIRST: tl.constexpr = R if NX == 1 else 0
    LAST: tl.constexpr = W + R if NX == 1 else TILE_X
    i_t = tl.program_id(0) // NE
    i_b = i_t // NX
    if i_b >= B:
        o_o = (tl.program_id(0) - B * NX * NE) * TILE_E + tl.arange(0, TILE_E)
        if p_norm3 is not None:
            vectors3 = (None, p_norm_weight3, None, p_running_mean3, p_running_var3)
            _store_norm(p_norm3, vectors3, p_norm_bias3, eps3, o_o, O, TILE_E, ACC)
    else:
        o_x = i_t % NX * TILE_W  # the first column
        o_e = tl.program_id(0) % NE * TILE_E + tl.arange(0, TILE_E)
        m_e = o_e < E
        vectors1 = (None, p_norm_weight1, p_norm_bias1, p_running_mean1, p_running_var1)
        b_scale1, b_shift1 = scale_and_shift(vectors1, eps1, o_e, m_e, TILE_E, ACC)
        vectors2 = (p_bias2, p_norm_weight2, p_norm_bias2, p_running_mean2, p_running_var2)
        b_scale2, b_shift2 = scale_and_shift(vectors2, eps2, o_e, m_e, TILE_E, ACC)
        b_weight = load_taps(p_weight2, o_e, m_e, KERNEL * KERNEL, ACC)
        b_taps = ()
        for k in tl.static_range(KERNEL * KERNEL):
            b_taps = b_taps + (b_weight[k] * b_scale2,)
        b_zero = tl.zeros((TILE_E,), dtype=ACC)
        # Sums of output rows that have not met all of their input rows yet.
        b_open = ()
        for _ in tl.static_range(2 * R * TILE_W):
            b_open = b_open + (b_shift2,)

        # Tokens, whose numbers times channels may take 64 bits.
        i_1 = i_b * (H * W + P) + P + o_x - R
        i_2 = i_b * H * W + o_x
        b_next = _load_row(p_z1 + i_1.to(tl.int64) * E + o_e, m_e, o_x, FIRST, LAST, R, W, E)
        for y in range(0, H):
            b_row = b_next
            p_row = p_z1 + (i_1 + (y + 1) * W).to(tl.int64) * E + o_e
            b_next = _load_row(p_row, m_e & (y + 1 < H), o_x, FIRST, LAST, R, W, E)
            b_a1 = ()
            for x in tl.static_range(TILE_X):
                if outside(x, W, R, NX):
                    b_a1 = b_a1 + (b_zero,)
                else:
                    b_z1 = b_row[x - FIRST].to(ACC)
                    if p_running_mean1 is not None:
                        b_z1 = b_z1 * b_scale1 + b_shift1
                    b_act = activate(b_z1, ACTIVATION1, EXACT)
                    if NX > 1:
                        b_act = tl.where((o_x + x >= R) & (o_x + x < W + R), b_act, 0.0)
                    b_a1 = b_a1 + (b_act,)
            b_rows = ()
            for i in tl.static_range((2 * R + 1) * TILE_W):
                if i < 2 * R * TILE_W:
                    b_z2 = b_open[i]
                else:
                    b_z2 = b_shift2
                for j in tl.static_range(KERNEL):
                    if not outside(i % TILE_W + j, W, R, NX):
                        b_z2 += b_a1[i % TILE_W + j] * b_taps[(2 * R - i // TILE_W) * KERNEL + j]
                b_rows = b_rows + (b_z2,)
            b_open = b_rows[TILE_W:]
            if y >= R:
                p_row = p_h2 + (i_2 + (y - R) * W).to(tl.int64) * E + o_e
                _store_row(p_row, b_rows, 0, m_e, o_x, ACTIVATION2, TILE_W, W, E, COMPUTE, EXACT)
        # Below the last row there is only padding.
        for i in tl.static_range(R):
            y2 = H - R + i
            p_row = p_h2 + (i_2 + y2 * W).to(tl.int64) * E + o_e
            mask = m_e & (y2 >= 0)
            _store_row(p_row, b_open, i * TILE_W, mask, o_x, ACTIVATION2, TILE_W, W, E, COMPUTE, EXACT)


@triton.jit
def _store_row(
    p_row, b_rows, first: tl.constexpr, mask, o_x, ACTIVATION: tl.constexpr, TILE_W: tl.constexpr, W: tl.constexpr,
    E: tl.constexpr, COMPUTE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Store the activations of TILE_W places of a row, which are those of a tuple from the first on."""
    for x in tl.static_range(TILE_W):
        b_h2 = activate(b_rows[first + x], ACTIVATION, EXACT).to(COMPUTE)
        tl.store(p_row + x * E, b_h2, mask=mask & (o_x + x < W))


@triton.jit
def _load_row(
    p_row, mask, o_x, FIRST: tl.constexpr, LAST: tl.constexpr, R: tl.constexpr, W: tl.constexpr, E: tl.constexpr
):
    """A tuple of places of a row with its margins."""
    b_row = ()
    for x in tl.static_range(FIRST, LAST):
        valid = (o_x + x >= R) & (o_x + x < W + R)
        b_row = b_row + (tl.load(p_row + x * E, mask=mask & valid, other=0.0),)
    return b_row


@triton.jit
def _store_norm(p_norm, vectors, p_bias, eps, o_o, O: tl.constexpr, TILE_O: tl.constexpr, ACC: tl.constexpr):
    """Mean, scale and shift of running statistics, where a ``norm`` array has them."""
    m_o = o_o < O
    b_scale, _ = scale_and_shift(vectors, eps, o_o, m_o, TILE_O, ACC)
    b_shift = tl.zeros((TILE_O,), dtype=ACC)
    if p_bias is not None:
        b_shift += tl.load(p_bias + o_o, mask=m_o, other=0.0).to(ACC)
    tl.store(p_norm + o_o, tl.load(vectors[3] + o_o, mask=m_o, other=0.0).to(ACC), mask=m_o)
    store_rows(p_norm + 3 * O, 0, b_scale, b_shift, o_o, m_o, O)
