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
from .kernels_depthwise import load_row, load_taps, outside

__all__ = ["ADDED_TILES", "leff_depthwise_inference_kernel"]

ADDED_TILES = tl.constexpr(4)  # of rows that are added to the last GEMM, of a program instance


@kernel
def leff_depthwise_inference_kernel(
    p_z1, p_norm_weight1, p_norm_bias1, p_running_mean1, p_running_var1,
    p_weight2, p_bias2, p_norm_weight2, p_norm_bias2, p_running_mean2, p_running_var2, p_h2,
    p_weight3, p_bias3, p_norm_weight3, p_norm_bias3, p_running_mean3, p_running_var3, p_norm3, p_scaled, p_added,
    p_x, p_residual, B, H, ROWS, eps1: tl.float64, eps2: tl.float64, eps3: tl.float64,
    P: tl.constexpr, W: tl.constexpr, E: tl.constexpr, O: tl.constexpr, KERNEL: tl.constexpr,
    ACTIVATION1: tl.constexpr, ACTIVATION2: tl.constexpr,
    TILE_W: tl.constexpr, TILE_E: tl.constexpr, TILE_R: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """h2 (M, E) = act(norm dw(act(norm z1))) from z1 (B, P + HW, E) and weight2 (E, KERNEL^2).

    The program instances behind those of the images prepare the last GEMM: what is added to its product, ROWS of O
    numbers, and weight3 (O, E) by the scale of its norm. What is added is the shift alone or, with rows of h2 that are
    zero for the prefix, all else in the result. Or they make the ``norm`` array of the last layer, for a kernel behind.
    """
    R: tl.constexpr = KERNEL // 2
    NX: tl.constexpr = (W + TILE_W - 1) // TILE_W
    NE: tl.constexpr = (E + TILE_E - 1) // TILE_E
    TILE_X: tl.constexpr = TILE_W + 2 * R
    # Places of a row that are loaded: without the margins where they are padding.
    FIRST: tl.constexpr = R if NX == 1 else 0
    LAST: tl.constexpr = W + R if NX == 1 else TILE_X
    P2: tl.constexpr = 0 if p_added is None else P  # of h2
    i_t = tl.program_id(0) // NE
    i_b = i_t // NX
    if i_b >= B:
        i = tl.program_id(0) - B * NX * NE
        vectors3 = (p_bias3, p_norm_weight3, p_norm_bias3, p_running_mean3, p_running_var3)
        if p_norm3 is not None:
            _store_norm(p_norm3, vectors3, eps3, i * TILE_E + tl.arange(0, TILE_E), O, TILE_E, ACC)
        if p_added is not None:
            adding = tl.cdiv(ROWS, ADDED_TILES * TILE_R) * tl.cdiv(O, TILE_E)
            if i < adding:
                _store_added(p_x, p_residual, p_added, vectors3, eps3, i, ROWS, H * W, P, O, TILE_R, TILE_E, ACC)
            i -= adding
        if p_scaled is not None:
            if i >= 0:
                _scale_weight(p_weight3, p_scaled, vectors3, eps3, i, O, E, TILE_R, TILE_E, ACC)
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
        i_2 = i_b * (H * W + P2) + P2 + o_x
        for k in tl.static_range(P2):
            if o_x == 0:
                p_prefix = p_h2 + (i_2 - 1 - k).to(tl.int64) * E + o_e
                tl.store(p_prefix, b_zero.to(COMPUTE), mask=m_e)
        b_next = load_row(p_z1 + i_1.to(tl.int64) * E + o_e, m_e, o_x, FIRST, LAST, R, W, E)
        for y in range(0, H):
            b_row = b_next
            p_row = p_z1 + (i_1 + (y + 1) * W).to(tl.int64) * E + o_e
            b_next = load_row(p_row, m_e & (y + 1 < H), o_x, FIRST, LAST, R, W, E)
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
def _scale_weight(
    p_weight, p_scaled, vectors, eps, i, O: tl.constexpr, E: tl.constexpr, TILE_R: tl.constexpr, TILE_E: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Tile i of a weight (O, E) by the scale of the norm behind it."""
    NE: tl.constexpr = (E + TILE_E - 1) // TILE_E
    o_o = i // NE * TILE_R + tl.arange(0, TILE_R)
    o_e = i % NE * TILE_E + tl.arange(0, TILE_E)
    b_scale, _ = scale_and_shift(vectors, eps, o_o, o_o < O, TILE_R, ACC)
    offsets = o_o[:, None] * E + o_e[None, :]
    mask = (o_o < O)[:, None] & (o_e < E)[None, :]
    b_weight = tl.load(p_weight + offsets, mask=mask, other=0.0).to(ACC) * b_scale[:, None]
    tl.store(p_scaled + offsets, b_weight.to(p_scaled.dtype.element_ty), mask=mask)


@triton.jit
def _store_added(
    p_x, p_residual, p_added, vectors, eps, i, ROWS, HW, P: tl.constexpr, O: tl.constexpr, TILE_R: tl.constexpr,
    TILE_O: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A few tiles of rows: the shift of a layer, or x where a row is a prefix token, and the residual."""
    NO: tl.constexpr = (O + TILE_O - 1) // TILE_O
    o_o = i % NO * TILE_O + tl.arange(0, TILE_O)
    o_r = tl.arange(0, TILE_R)
    m_o = o_o < O
    _, b_shift = scale_and_shift(vectors, eps, o_o, m_o, TILE_O, ACC)
    for k in tl.static_range(ADDED_TILES):
        row = (i // NO * ADDED_TILES + k) * TILE_R
        offsets = row.to(tl.int64) * O + (o_r[:, None] * O + o_o[None, :])
        mask = (row + o_r < ROWS)[:, None] & m_o[None, :]
        b_added = tl.zeros((TILE_R, TILE_O), dtype=ACC) + b_shift[None, :]
        if P > 0:
            if (row % (HW + P) < P) | (row % (HW + P) + TILE_R > HW + P):
                m_p = ((row + o_r) % (HW + P) < P)[:, None]
                b_added = tl.where(m_p, tl.load(p_x + offsets, mask=mask & m_p, other=0.0).to(ACC), b_added)
        if p_residual is not None:
            b_added += tl.load(p_residual + offsets, mask=mask, other=0.0).to(ACC)
        tl.store(p_added + offsets, b_added.to(p_added.dtype.element_ty), mask=mask)


@triton.jit
def _store_norm(p_norm, vectors, eps, o_o, O: tl.constexpr, TILE_O: tl.constexpr, ACC: tl.constexpr):
    """Mean, scale and shift of running statistics, where a ``norm`` array has them; without the layer's bias."""
    _, p_norm_weight, p_norm_bias, p_mean, p_variance = vectors
    m_o = o_o < O
    b_scale, _ = scale_and_shift((None, p_norm_weight, None, p_mean, p_variance), eps, o_o, m_o, TILE_O, ACC)
    b_shift = tl.zeros((TILE_O,), dtype=ACC)
    if p_norm_bias is not None:
        b_shift += tl.load(p_norm_bias + o_o, mask=m_o, other=0.0).to(ACC)
    tl.store(p_norm + o_o, tl.load(p_mean + o_o, mask=m_o, other=0.0).to(ACC), mask=m_o)
    store_rows(p_norm + 3 * O, 0, b_scale, b_shift, o_o, m_o, O)
