"""Device code of the class-token attention, in its absorbed form.

There is one query per image, so the key and value projections move to its side of the attention (h: head, l: layer):

    score_hl = scale * (W_k,h^T q_h) . x_l        out_h = W_v,h (sum_l p_hl x_l) + (sum_l p_hl) b_v,h

which takes 4 C^2 + 2 H L C multiply-adds an image instead of (2 + 2 L) C^2. The key's bias shifts every score of a head
alike and drops out of the softmax. Under dropout the probabilities p no longer add up to one, hence b_v's factor.

Names: ``p_`` pointer, ``i_`` index of a program instance or of a loop, ``o_`` offsets, ``m_`` mask, ``b_`` a tile in
registers with its shape behind it. TILE_B images, TILE_L layers, TILE_C channels and TILE_D >= D channels of a head
make a tile; LP is the number of layers rounded up to whole tiles. Matmuls run on COMPUTE operands and accumulate in
ACC. SCALE and KEEP_SCALE are constants because a float argument reaches a kernel as float32.
"""

import triton
import triton.language as tl

from ...common.kernel import kernel

__all__ = [
    "lca_backward_input_kernel",
    "lca_backward_scores_kernel",
    "lca_backward_weight_kernel",
    "lca_forward_kernel",
]


@triton.jit
def _load_weight(p_weight, row, o_d, o_c, C: tl.constexpr, D: tl.constexpr, COMPUTE: tl.constexpr):
    """One head's rows of the (3C, C) weight, from ``row`` on."""
    mask = (o_d < D)[:, None] & (o_c < C)[None, :]
    return tl.load(p_weight + (row + o_d)[:, None] * C + o_c[None, :], mask=mask, other=0.0).to(
        COMPUTE
    )  # [TILE_D, TILE_C]


@triton.jit
def _load_head(p_rows, o_b, i_h, o_d, B, C: tl.constexpr, D: tl.constexpr, COMPUTE: tl.constexpr):
    """One head's channels of a (B, C) tensor."""
    mask = (o_b < B)[:, None] & (o_d < D)[None, :]
    offsets = o_b.to(tl.int64)[:, None] * C + (i_h * D + o_d)[None, :]
    return tl.load(p_rows + offsets, mask=mask, other=0.0).to(COMPUTE)  # [TILE_B, TILE_D]


@triton.jit
def _store_head(p_rows, o_b, i_h, o_d, b_rows, B, C: tl.constexpr, D: tl.constexpr):
    mask = (o_b < B)[:, None] & (o_d < D)[None, :]
    offsets = o_b.to(tl.int64)[:, None] * C + (i_h * D + o_d)[None, :]
    tl.store(p_rows + offsets, b_rows.to(p_rows.dtype.element_ty), mask=mask)


@triton.jit
def _load_last(p_x, o_b, o_c, B, L, C: tl.constexpr, COMPUTE: tl.constexpr):
    """The last layer's token, the one that asks."""
    mask = (o_b < B)[:, None] & (o_c < C)[None, :]
    offsets = (o_b.to(tl.int64) * L + (L - 1))[:, None] * C + o_c[None, :]
    return tl.load(p_x + offsets, mask=mask, other=0.0).to(COMPUTE)  # [TILE_B, TILE_C]


@triton.jit
def _load_layers(p_x, o_b, o_l, o_c, B, L, C: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr):
    mask = (o_b < B)[:, None, None] & (o_l < L)[None, :, None] & (o_c < C)[None, None, :]
    offsets = (o_b.to(tl.int64)[:, None] * L + o_l[None, :])[:, :, None] * C + o_c[None, None, :]
    # By way of COMPUTE, so that a float32 input under autocast is rounded as a cast would round it.
    return tl.load(p_x + offsets, mask=mask, other=0.0).to(COMPUTE).to(ACC)  # [TILE_B, TILE_L, TILE_C]


@triton.jit
def _place_tile(b_tile, i_l, TILE_B: tl.constexpr, TILE_L: tl.constexpr, LP: tl.constexpr):
    """A tile of layers at its place among all of them, zeros elsewhere."""
    if LP == TILE_L:
        return b_tile
    else:
        here = tl.arange(0, LP // TILE_L) == i_l
        placed = tl.where(here[None, :, None], b_tile[:, None, :], tl.zeros_like(b_tile)[:, None, :])
        return tl.reshape(placed, (TILE_B, LP))


@triton.jit
def _take_tile(b_layers, i_l, TILE_B: tl.constexpr, TILE_L: tl.constexpr, LP: tl.constexpr):
    """Tile ``i_l`` of the layers; the inverse of ``_place_tile``."""
    if LP == TILE_L:
        return b_layers
    else:
        b_tiles = tl.reshape(b_layers, (TILE_B, LP // TILE_L, TILE_L))
        here = tl.arange(0, LP // TILE_L) == i_l
        return tl.sum(tl.where(here[None, :, None], b_tiles, tl.zeros_like(b_tiles)), axis=1)


@triton.jit
def _mix_layers(
    p_x, b_weights, o_b, o_c, B, L,
    C: tl.constexpr, TILE_B: tl.constexpr, TILE_L: tl.constexpr, LP: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The layers' tokens, summed with a weight for each."""
    b_sum = tl.zeros((TILE_B, o_c.shape[0]), dtype=ACC)
    for i_l in range(LP // TILE_L):
        b_x = _load_layers(p_x, o_b, i_l * TILE_L + tl.arange(0, TILE_L), o_c, B, L, C, COMPUTE, ACC)
        b_sum += tl.sum(_take_tile(b_weights, i_l, TILE_B, TILE_L, LP)[:, :, None] * b_x, axis=1)
    return b_sum  # [TILE_B, TILE_C]


@triton.jit
def _compare_layers(
    p_x, b_other, o_b, o_c, B, L,
    C: tl.constexpr, TILE_B: tl.constexpr, TILE_L: tl.constexpr, LP: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The dot product of a vector of each image with each of its layers' tokens, over one tile of channels."""
    b_dots = tl.zeros((TILE_B, LP), dtype=ACC)
    for i_l in range(LP // TILE_L):
        b_x = _load_layers(p_x, o_b, i_l * TILE_L + tl.arange(0, TILE_L), o_c, B, L, C, COMPUTE, ACC)
        b_dots += _place_tile(tl.sum(b_other[:, None, :] * b_x, axis=2), i_l, TILE_B, TILE_L, LP)
    return b_dots  # [TILE_B, LP]


@triton.jit
def _project_query(
    p_x, p_weight, p_bias, o_b, i_h, o_d, B, L,
    C: tl.constexpr, D: tl.constexpr, HAS_BIAS: tl.constexpr, TILE_B: tl.constexpr, TILE_C: tl.constexpr,
    TILE_D: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_q = tl.zeros((TILE_B, TILE_D), dtype=ACC)
    for c in range(0, C, TILE_C):
        o_c = c + tl.arange(0, TILE_C)
        b_last = _load_last(p_x, o_b, o_c, B, L, C, COMPUTE)
        b_weight = _load_weight(p_weight, i_h * D, o_d, o_c, C, D, COMPUTE)
        b_q = tl.dot(b_last, tl.trans(b_weight), b_q, input_precision=PRECISION, out_dtype=ACC)
    if HAS_BIAS:
        b_q += tl.load(p_bias + i_h * D + o_d, mask=o_d < D, other=0.0).to(COMPUTE).to(ACC)[None, :]
    return b_q.to(COMPUTE)  # [TILE_B, TILE_D]


@triton.jit
def _softmax(b_scores, L, LP: tl.constexpr, ACC: tl.constexpr):
    b_scores = tl.where((tl.arange(0, LP) < L)[None, :], b_scores, float("-inf"))
    b_exp = tl.exp(b_scores - tl.max(b_scores, axis=1)[:, None])
    return (b_exp / tl.sum(b_exp, axis=1)[:, None]).to(ACC)  # [TILE_B, LP]


@triton.jit
def _dropout_factor(
    p_seed, o_b, i_h, drop_below, L,
    H: tl.constexpr, KEEP_SCALE: tl.constexpr, LP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """0 where a probability is dropped, KEEP_SCALE elsewhere; counted as the elements of (B, H, 1, L)."""
    index = (o_b.to(tl.int64) * H + i_h)[:, None] * L + tl.arange(0, LP)[None, :]
    bits = tl.randint(tl.load(p_seed), index).to(tl.uint32, bitcast=True).to(tl.int64)
    return (bits >= drop_below).to(ACC) * KEEP_SCALE  # [TILE_B, LP]


@kernel
def lca_forward_kernel(
    p_x, p_weight, p_bias, p_seed, p_out, B, L, drop_below,
    C: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, KEEP_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    TILE_B: tl.constexpr, TILE_L: tl.constexpr, LP: tl.constexpr, TILE_C: tl.constexpr, TILE_D: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, C): the whole attention of one head for TILE_B images."""
    i_h = tl.program_id(1)
    o_b = tl.program_id(0) * TILE_B + tl.arange(0, TILE_B)
    o_d = tl.arange(0, TILE_D)

    b_q = _project_query(
        p_x, p_weight, p_bias, o_b, i_h, o_d, B, L, C, D, HAS_BIAS, TILE_B, TILE_C, TILE_D, COMPUTE, ACC, PRECISION
    )
    b_scores = tl.zeros((TILE_B, LP), dtype=ACC)
    for c in range(0, C, TILE_C):
        o_c = c + tl.arange(0, TILE_C)
        b_weight = _load_weight(p_weight, C + i_h * D, o_d, o_c, C, D, COMPUTE)
        b_key = tl.dot(b_q, b_weight, input_precision=PRECISION, out_dtype=ACC)  # [TILE_B, TILE_C]
        b_scores += _compare_layers(p_x, b_key, o_b, o_c, B, L, C, TILE_B, TILE_L, LP, COMPUTE, ACC)
    b_p = _softmax(b_scores * SCALE, L, LP, ACC)
    if HAS_DROPOUT:
        b_p *= _dropout_factor(p_seed, o_b, i_h, drop_below, L, C // D, KEEP_SCALE, LP, ACC)

    b_out = tl.zeros((TILE_B, TILE_D), dtype=ACC)
    for c in range(0, C, TILE_C):
        o_c = c + tl.arange(0, TILE_C)
        b_mixed = _mix_layers(p_x, b_p, o_b, o_c, B, L, C, TILE_B, TILE_L, LP, COMPUTE, ACC).to(COMPUTE)
        b_weight = _load_weight(p_weight, 2 * C + i_h * D, o_d, o_c, C, D, COMPUTE)
        b_out = tl.dot(b_mixed, tl.trans(b_weight), b_out, input_precision=PRECISION, out_dtype=ACC)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + 2 * C + i_h * D + o_d, mask=o_d < D, other=0.0).to(COMPUTE).to(ACC)
        b_out += tl.sum(b_p, axis=1)[:, None] * b_bias[None, :]
    _store_head(p_out, o_b, i_h, o_d, b_out, B, C, D)


@kernel
def lca_backward_scores_kernel(
    p_grad, p_x, p_weight, p_bias, p_seed, p_q, p_dq, p_p, p_ds, B, L, drop_below,
    C: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, KEEP_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    TILE_B: tl.constexpr, TILE_L: tl.constexpr, LP: tl.constexpr, TILE_C: tl.constexpr, TILE_D: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, dq (B, C) and p, ds (B, H, L) of one head for TILE_B images: what the other two kernels build gradients from.

    p is the probability after dropout, ds the gradient of q_h . k_l, with the scale in it.
    """
    i_h = tl.program_id(1)
    o_b = tl.program_id(0) * TILE_B + tl.arange(0, TILE_B)
    o_d = tl.arange(0, TILE_D)
    o_l = tl.arange(0, LP)

    b_q = _project_query(
        p_x, p_weight, p_bias, o_b, i_h, o_d, B, L, C, D, HAS_BIAS, TILE_B, TILE_C, TILE_D, COMPUTE, ACC, PRECISION
    )
    b_grad = _load_head(p_grad, o_b, i_h, o_d, B, C, D, COMPUTE)
    b_scores = tl.zeros((TILE_B, LP), dtype=ACC)
    b_dp = tl.zeros((TILE_B, LP), dtype=ACC)
    for c in range(0, C, TILE_C):
        o_c = c + tl.arange(0, TILE_C)
        b_weight = _load_weight(p_weight, C + i_h * D, o_d, o_c, C, D, COMPUTE)
        b_key = tl.dot(b_q, b_weight, input_precision=PRECISION, out_dtype=ACC)
        b_scores += _compare_layers(p_x, b_key, o_b, o_c, B, L, C, TILE_B, TILE_L, LP, COMPUTE, ACC)
        b_weight = _load_weight(p_weight, 2 * C + i_h * D, o_d, o_c, C, D, COMPUTE)
        b_value = tl.dot(b_grad, b_weight, input_precision=PRECISION, out_dtype=ACC)
        b_dp += _compare_layers(p_x, b_value, o_b, o_c, B, L, C, TILE_B, TILE_L, LP, COMPUTE, ACC)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + 2 * C + i_h * D + o_d, mask=o_d < D, other=0.0).to(COMPUTE).to(ACC)
        b_dp += tl.sum(b_grad.to(ACC) * b_bias[None, :], axis=1)[:, None]

    b_softmax = _softmax(b_scores * SCALE, L, LP, ACC)
    b_p = b_softmax
    if HAS_DROPOUT:
        b_factor = _dropout_factor(p_seed, o_b, i_h, drop_below, L, C // D, KEEP_SCALE, LP, ACC)
        b_p *= b_factor
        b_dp *= b_factor
    # Only differences count, of what may be large and nearly the same.
    b_dp -= tl.max(tl.where((o_l < L)[None, :], b_dp, float("-inf")), axis=1)[:, None]
    b_ds = SCALE * b_softmax * (b_dp - tl.sum(b_softmax * b_dp, axis=1)[:, None])

    b_dq = tl.zeros((TILE_B, TILE_D), dtype=ACC)
    for c in range(0, C, TILE_C):
        o_c = c + tl.arange(0, TILE_C)
        b_mixed = _mix_layers(p_x, b_ds, o_b, o_c, B, L, C, TILE_B, TILE_L, LP, COMPUTE, ACC).to(COMPUTE)
        b_weight = _load_weight(p_weight, C + i_h * D, o_d, o_c, C, D, COMPUTE)
        b_dq = tl.dot(b_mixed, tl.trans(b_weight), b_dq, input_precision=PRECISION, out_dtype=ACC)

    _store_head(p_q, o_b, i_h, o_d, b_q, B, C, D)
    _store_head(p_dq, o_b, i_h, o_d, b_dq, B, C, D)
    offsets = (o_b.to(tl.int64) * (C // D) + i_h)[:, None] * L + o_l[None, :]
    m_layers = (o_b < B)[:, None] & (o_l < L)[None, :]
    tl.store(p_p + offsets, b_p, mask=m_layers)
    tl.store(p_ds + offsets, b_ds, mask=m_layers)


@kernel
def lca_backward_input_kernel(
    p_grad, p_weight, p_q, p_dq, p_p, p_ds, p_dx, B, L, H,
    C: tl.constexpr, D: tl.constexpr,
    TILE_B: tl.constexpr, TILE_L: tl.constexpr, TILE_C: tl.constexpr, TILE_D: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx (B, L, C), a tile of channels and a tile of layers for TILE_B images: the sum over the H heads.

    H is no constant, or a loop over a few heads would be unrolled whole, for more registers than there are.
    """
    o_b = tl.program_id(0) * TILE_B + tl.arange(0, TILE_B)
    o_c = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    o_l = tl.program_id(2) * TILE_L + tl.arange(0, TILE_L)
    o_d = tl.arange(0, TILE_D)
    m_layers = (o_b < B)[:, None] & (o_l < L)[None, :]

    b_dx = tl.zeros((TILE_B, TILE_L, TILE_C), dtype=ACC)
    b_dlast = tl.zeros((TILE_B, TILE_C), dtype=ACC)
    for i_h in range(H):
        b_q = _load_head(p_q, o_b, i_h, o_d, B, C, D, COMPUTE)
        b_weight = _load_weight(p_weight, C + i_h * D, o_d, o_c, C, D, COMPUTE)
        b_key = tl.dot(b_q, b_weight, input_precision=PRECISION, out_dtype=ACC)
        b_grad = _load_head(p_grad, o_b, i_h, o_d, B, C, D, COMPUTE)
        b_weight = _load_weight(p_weight, 2 * C + i_h * D, o_d, o_c, C, D, COMPUTE)
        b_value = tl.dot(b_grad, b_weight, input_precision=PRECISION, out_dtype=ACC)
        offsets = (o_b.to(tl.int64) * H + i_h)[:, None] * L + o_l[None, :]
        b_p = tl.load(p_p + offsets, mask=m_layers, other=0.0)
        b_ds = tl.load(p_ds + offsets, mask=m_layers, other=0.0)
        b_dx += b_p[:, :, None] * b_value[:, None, :] + b_ds[:, :, None] * b_key[:, None, :]
        b_dq = _load_head(p_dq, o_b, i_h, o_d, B, C, D, COMPUTE)
        b_weight = _load_weight(p_weight, i_h * D, o_d, o_c, C, D, COMPUTE)
        b_dlast = tl.dot(b_dq, b_weight, b_dlast, input_precision=PRECISION, out_dtype=ACC)
    b_dx += tl.where((o_l == L - 1)[None, :, None], b_dlast[:, None, :], 0.0)

    offsets = (o_b.to(tl.int64)[:, None] * L + o_l[None, :])[:, :, None] * C + o_c[None, None, :]
    tl.store(p_dx + offsets, b_dx.to(p_dx.dtype.element_ty), mask=m_layers[:, :, None] & (o_c < C)[None, None, :])


@kernel
def lca_backward_weight_kernel(
    p_grad, p_x, p_q, p_dq, p_p, p_ds, p_dweight, p_dbias, B, L,
    C: tl.constexpr, D: tl.constexpr, HAS_BIAS: tl.constexpr,
    TILE_B: tl.constexpr, TILE_L: tl.constexpr, LP: tl.constexpr, TILE_C: tl.constexpr, TILE_D: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dweight (3C, C) and dbias (3C,), one head's rows and a tile of columns: the sum over all images, in order."""
    i_h = tl.program_id(0)
    o_c = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    o_d = tl.arange(0, TILE_D)
    o_l = tl.arange(0, LP)

    b_dwq = tl.zeros((TILE_D, TILE_C), dtype=ACC)
    b_dwk = tl.zeros((TILE_D, TILE_C), dtype=ACC)
    b_dwv = tl.zeros((TILE_D, TILE_C), dtype=ACC)
    b_dbq = tl.zeros((TILE_D,), dtype=ACC)
    b_dbv = tl.zeros((TILE_D,), dtype=ACC)
    for b in range(0, B, TILE_B):
        o_b = b + tl.arange(0, TILE_B)
        offsets = (o_b.to(tl.int64) * (C // D) + i_h)[:, None] * L + o_l[None, :]
        m_layers = (o_b < B)[:, None] & (o_l < L)[None, :]
        b_p = tl.load(p_p + offsets, mask=m_layers, other=0.0)
        b_ds = tl.load(p_ds + offsets, mask=m_layers, other=0.0)

        b_dq = _load_head(p_dq, o_b, i_h, o_d, B, C, D, COMPUTE)
        b_last = _load_last(p_x, o_b, o_c, B, L, C, COMPUTE)
        b_dwq = tl.dot(tl.trans(b_dq), b_last, b_dwq, input_precision=PRECISION, out_dtype=ACC)

        b_q = _load_head(p_q, o_b, i_h, o_d, B, C, D, COMPUTE)
        b_mixed = _mix_layers(p_x, b_ds, o_b, o_c, B, L, C, TILE_B, TILE_L, LP, COMPUTE, ACC).to(COMPUTE)
        b_dwk = tl.dot(tl.trans(b_q), b_mixed, b_dwk, input_precision=PRECISION, out_dtype=ACC)

        b_grad = _load_head(p_grad, o_b, i_h, o_d, B, C, D, COMPUTE)
        b_mixed = _mix_layers(p_x, b_p, o_b, o_c, B, L, C, TILE_B, TILE_L, LP, COMPUTE, ACC).to(COMPUTE)
        b_dwv = tl.dot(tl.trans(b_grad), b_mixed, b_dwv, input_precision=PRECISION, out_dtype=ACC)
        if HAS_BIAS:
            b_dbq += tl.sum(b_dq.to(ACC), axis=0)
            b_dbv += tl.sum(b_grad.to(ACC) * tl.sum(b_p, axis=1)[:, None], axis=0)

    o_weight = (i_h * D + o_d)[:, None] * C + o_c[None, :]
    m_weight = (o_d < D)[:, None] & (o_c < C)[None, :]
    weight_type = p_dweight.dtype.element_ty
    tl.store(p_dweight + o_weight, b_dwq.to(weight_type), mask=m_weight)
    tl.store(p_dweight + C * C + o_weight, b_dwk.to(weight_type), mask=m_weight)
    tl.store(p_dweight + 2 * C * C + o_weight, b_dwv.to(weight_type), mask=m_weight)
    if HAS_BIAS:
        if tl.program_id(1) == 0:
            o_bias = i_h * D + o_d
            bias_type = p_dbias.dtype.element_ty
            tl.store(p_dbias + o_bias, b_dbq.to(bias_type), mask=o_d < D)
            tl.store(p_dbias + C + o_bias, tl.zeros_like(b_dbq).to(bias_type), mask=o_d < D)
            tl.store(p_dbias + 2 * C + o_bias, b_dbv.to(bias_type), mask=o_d < D)
