"""The GEMMs of training, forward and backward, with what is fused into them."""

import triton
import triton.language as tl

from ...common.activations import activate_with_slope
from ...common.kernel import kernel
from ...common.partials import store_rows
from .kernels_common import (
    ONE,
    PLAIN,
    compute_once,
    load_operand,
    norm_rows,
    normalize,
    pass_prefix,
    store_moments,
    token_rows,
    zeros,
)
from .kernels_reduce import norm_by_last

__all__ = [
    "contract_operand",
    "leff_contract_operand_kernel",
    "leff_expand_moments_kernel",
    "leff_hidden_gradient_kernel",
    "leff_weight_gradient_kernel",
    "partial_product",
]


@kernel
def leff_expand_moments_kernel(
    p_x, p_weight, p_bias, p_z1, p_partial, p_count, p_tickets, p_norm, p_total, p_norm_weight, p_norm_bias,
    p_running_mean, p_running_var, p_batches, momentum: tl.float64, M, HW, GROUP,
    P: tl.constexpr, C: tl.constexpr, E: tl.constexpr, EPS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_E: tl.constexpr, TILE_C: tl.constexpr, TILE_T: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z1 (M, E) = x W_1^T + b_1 from x (B, P + HW, C) and weight (E, C); its partial moments, and with tickets
    ``norm_by_last``.
    """
    i_m, i_e = tl.program_id(0) // tl.cdiv(E, TILE_E), tl.program_id(0) % tl.cdiv(E, TILE_E)
    o_r = tl.arange(0, TILE_M)
    o_m = i_m * TILE_M + o_r
    o_e = i_e * TILE_E + tl.arange(0, TILE_E)
    m_m, m_e = o_m < M, o_e < E
    row, o_t = token_rows(o_m, i_m * TILE_M, HW, P)
    p_rows = p_x + row * C + o_t[:, None] * C

    b_z1 = tl.zeros((TILE_M, TILE_E), dtype=ACC)
    for c in range(0, C, TILE_C):
        o_c = c + tl.arange(0, TILE_C)
        m_c = (o_c < C)[None, :]
        b_x = tl.load(p_rows + o_c[None, :], mask=m_m[:, None] & m_c, other=0.0).to(COMPUTE)  # [TILE_M, TILE_C]
        b_weight = tl.load(p_weight + o_e[:, None] * C + o_c[None, :], mask=m_e[:, None] & m_c, other=0.0)
        b_z1 = tl.dot(b_x, tl.trans(b_weight), b_z1, input_precision=PRECISION, out_dtype=ACC)
    if p_bias is not None:
        b_z1 += tl.load(p_bias + o_e, mask=m_e, other=0.0).to(ACC)[None, :]
    b_out = b_z1.to(COMPUTE)
    p_tile = p_z1 + (i_m * TILE_M).to(tl.int64) * E
    tl.store(p_tile + o_r[:, None] * E + o_e[None, :], b_out, mask=m_m[:, None] & m_e[None, :])
    if p_partial is not None:
        store_moments(p_partial, p_count, i_m, b_out.to(ACC), M - i_m * TILE_M, o_e, m_e, i_e == 0, E, ACC)
    if p_tickets is not None:
        norm_by_last(
            p_partial, p_count, p_tickets, p_norm, p_total,
            (p_norm_weight, p_norm_bias, p_running_mean, p_running_var, p_batches, momentum),
            tl.minimum(M - i_m * TILE_M, TILE_M).to(ACC), i_m, i_e, tl.cdiv(M, TILE_M), GROUP,
            EPS, E, ONE, TILE_T, TILE_E, ACC,
        )  # fmt: skip


@kernel
def leff_contract_operand_kernel(
    p_a, p_z, p_rows, p_weight, p_bias, p_operand, p_out, p_prefix, p_residual, p_partial, p_count, p_tickets, p_norm,
    p_total, p_norm_weight, p_norm_bias, p_running_mean, p_running_var, p_batches, momentum: tl.float64,
    B, M, HW, GROUP,
    P: tl.constexpr, E: tl.constexpr, O: tl.constexpr, STRIDE_O: tl.constexpr, STRIDE_E: tl.constexpr,
    OPERAND: tl.constexpr, EPS: tl.constexpr, TILE_M: tl.constexpr, TILE_E: tl.constexpr, TILE_O: tl.constexpr,
    NUM_O: tl.constexpr, TILE_T: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """``contract_operand``: forward z3 from z2, and with tickets ``norm_by_last``; backward the gradient of x from that
    of the first norm.
    """
    contract_operand(
        tl.program_id(0), p_a, p_z, p_rows, p_weight, p_bias, p_operand, None, None, None, None, p_out, p_prefix,
        p_residual, p_partial, p_count, B, M, HW, P, E, O, STRIDE_O, STRIDE_E, OPERAND, TILE_M, TILE_E, TILE_O, NUM_O,
        COMPUTE, ACC, PRECISION, EXACT,
    )  # fmt: skip
    if p_tickets is not None:
        columns: tl.constexpr = (O + NUM_O * TILE_O - 1) // (NUM_O * TILE_O)
        i_m, i_o = tl.program_id(0) // columns, tl.program_id(0) % columns * NUM_O
        norm_by_last(
            p_partial, p_count, p_tickets, p_norm, p_total,
            (p_norm_weight, p_norm_bias, p_running_mean, p_running_var, p_batches, momentum),
            tl.minimum(M - i_m * TILE_M, TILE_M).to(ACC), i_m, i_o, tl.cdiv(M, TILE_M), GROUP,
            EPS, O, NUM_O, TILE_T, TILE_O, ACC,
        )  # fmt: skip


@triton.jit
def contract_operand(
    i, p_a, p_z, p_rows, p_weight, p_bias, p_operand, p_tokens, p_sums, p_total, p_tail, p_out, p_prefix, p_residual,
    p_partial, p_count, B, M, HW, P,
    E: tl.constexpr, O: tl.constexpr, STRIDE_O: tl.constexpr, STRIDE_E: tl.constexpr,
    OPERAND: tl.constexpr, TILE_M: tl.constexpr, TILE_E: tl.constexpr, TILE_O: tl.constexpr, NUM_O: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out (B, P + HW, O) = operand W^T (+ (tokens - mean) tail) (+ b) (+ residual), with an operand (M, E) as of
    ``load_operand``, tokens (B, P + HW, O) whose mean is sums (O,) by a total (1,), and a symmetric tail (O, O).

    Program instance i takes NUM_O tiles of TILE_O outputs, so that the operand is computed once where they are all. It
    may keep the operand, for another GEMM, and partial moments of the result. Behind the image tokens' tiles come those
    of the prefix, which is copied.

    The GEMM is computed as W operand^T: the operand is then what tensor cores read from shared memory, once it is
    computed, for all tiles.
    """
    # Neighbours in launch order share their operand, which then comes from cache.
    i_m = i // tl.cdiv(O, NUM_O * TILE_O)
    i_o = i % tl.cdiv(O, NUM_O * TILE_O) * NUM_O
    o_o = i_o * TILE_O + tl.arange(0, TILE_O)
    if i_m >= tl.cdiv(M, TILE_M):
        for k in tl.static_range(NUM_O):
            i_p = i_m - tl.cdiv(M, TILE_M)
            pass_prefix(p_prefix, p_residual, p_out, i_p, o_o + k * TILE_O, B, HW, P, O, TILE_M)
    else:
        o_r = tl.arange(0, TILE_M)
        o_m = i_m * TILE_M + o_r
        m_m = o_m < M
        start = (i_m * TILE_M).to(tl.int64) * E
        b_outs = zeros(TILE_O, TILE_M, NUM_O, ACC)
        for e in range(0, E, TILE_E):
            o_e = e + tl.arange(0, TILE_E)
            m_e = o_e < E
            offsets = start + (o_r[:, None] * E + o_e[None, :])
            mask = m_m[:, None] & m_e[None, :]
            b_a = load_operand(p_a, p_z, p_rows, offsets, mask, o_e, m_e, E, OPERAND, COMPUTE, ACC, EXACT)
            if p_operand is not None:
                tl.store(p_operand + offsets, b_a, mask=mask & (i_o == 0))
            b_outs = _accumulate(
                b_outs, p_weight, b_a, o_o, o_e, m_e, O, STRIDE_O, STRIDE_E, TILE_O, NUM_O, ACC, PRECISION
            )
        row, o_t = token_rows(o_m, i_m * TILE_M, HW, P)
        if p_tail is not None:
            for c in range(0, O, TILE_E):
                o_c = c + tl.arange(0, TILE_E)
                m_c = o_c < O
                p_tile = p_tokens + row * O + (o_t[:, None] * O + o_c[None, :])
                b_tokens = tl.load(p_tile, mask=m_m[:, None] & m_c[None, :], other=0.0).to(ACC)
                b_mean = tl.load(p_sums + o_c, mask=m_c, other=0.0) / tl.load(p_total)
                b_tokens = (b_tokens - b_mean[None, :]).to(COMPUTE)
                b_outs = _accumulate(b_outs, p_tail, b_tokens, o_o, o_c, m_c, O, O, ONE, TILE_O, NUM_O, ACC, PRECISION)
        for k in tl.static_range(NUM_O):
            o_k = o_o + k * TILE_O
            m_k = o_k < O
            mask = m_m[:, None] & m_k[None, :]
            offsets = row * O + (o_t[:, None] * O + o_k[None, :])
            b_out = tl.trans(b_outs[k])
            if p_bias is not None:
                b_out += tl.load(p_bias + o_k, mask=m_k, other=0.0).to(ACC)[None, :]
            if p_residual is not None:
                b_out += tl.load(p_residual + offsets, mask=mask, other=0.0).to(ACC)
            b_stored = b_out.to(p_out.dtype.element_ty)
            if p_partial is not None:
                b_stored = compute_once(b_stored)  # or registers would spill where tickets follow
            tl.store(p_out + offsets, b_stored, mask=mask)
            if p_partial is not None:
                first = (i_o == 0) & (k == 0)
                store_moments(p_partial, p_count, i_m, b_stored.to(ACC), M - i_m * TILE_M, o_k, m_k, first, O, ACC)


@triton.jit
def _accumulate(
    b_outs, p_weight, b_a, o_o, o_e, m_e, O: tl.constexpr, STRIDE_O: tl.constexpr, STRIDE_E: tl.constexpr,
    TILE_O: tl.constexpr, NUM_O: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add weight (TILE_O, TILE_E) times a (TILE_M, TILE_E)^T to each tile of outputs."""
    b_a = tl.trans(b_a)  # [TILE_E, TILE_M]
    p_tile = p_weight + o_o[:, None] * STRIDE_O + o_e[None, :] * STRIDE_E
    b_sums = ()
    for k in tl.static_range(NUM_O):
        mask = (o_o + k * TILE_O < O)[:, None] & m_e[None, :]
        b_weight = tl.load(p_tile + k * TILE_O * STRIDE_O, mask=mask, other=0.0)  # [TILE_O, TILE_E]
        b_sums = b_sums + (tl.dot(b_weight, b_a, b_outs[k], input_precision=PRECISION, out_dtype=ACC),)
    return b_sums


@kernel
def leff_hidden_gradient_kernel(
    p_dz3, p_weight, p_z2, p_norm2, p_g2, p_partial, M, HW,
    P: tl.constexpr, O: tl.constexpr, E: tl.constexpr, ACTIVATION: tl.constexpr,
    TILE_M: tl.constexpr, TILE_E: tl.constexpr, TILE_O: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """g2 (M, E) = (dz3 W_3) act'(norm z2), the gradient of norm z2, from dz3 (B, P + HW, O) and weight (O, E); partial
    sums (T, 2, E) of g2 and of g2 (z2 - mean).
    """
    i_m, i_e = tl.program_id(0) // tl.cdiv(E, TILE_E), tl.program_id(0) % tl.cdiv(E, TILE_E)
    o_r = tl.arange(0, TILE_M)
    o_m = i_m * TILE_M + o_r
    o_e = i_e * TILE_E + tl.arange(0, TILE_E)
    m_m, m_e = o_m < M, o_e < E
    row, o_t = token_rows(o_m, i_m * TILE_M, HW, P)
    p_rows = p_dz3 + row * O + o_t[:, None] * O

    b_g2 = tl.zeros((TILE_M, TILE_E), dtype=ACC)
    for o in range(0, O, TILE_O):
        o_o = o + tl.arange(0, TILE_O)
        m_o = o_o < O
        b_dz3 = tl.load(p_rows + o_o[None, :], mask=m_m[:, None] & m_o[None, :], other=0.0).to(COMPUTE)
        mask = m_o[:, None] & m_e[None, :]
        b_weight = tl.load(p_weight + o_o[:, None] * E + o_e[None, :], mask=mask, other=0.0)  # [TILE_O, TILE_E]
        b_g2 = tl.dot(b_dz3, b_weight, b_g2, input_precision=PRECISION, out_dtype=ACC)

    mask = m_m[:, None] & m_e[None, :]
    offsets = (i_m * TILE_M).to(tl.int64) * E + (o_r[:, None] * E + o_e[None, :])
    b_norm = norm_rows(p_norm2, o_e[None, :], m_e[None, :], E)
    b_z2 = tl.load(p_z2 + offsets, mask=mask, other=0.0).to(ACC)
    _, b_slope = activate_with_slope(normalize(b_z2, p_norm2, b_norm, EXACT), ACTIVATION, EXACT)
    b_out = (b_g2 * b_slope).to(COMPUTE)
    tl.store(p_g2 + offsets, b_out, mask=mask)
    b_g2 = b_out.to(ACC)
    store_rows(p_partial, i_m, tl.sum(b_g2, axis=0), tl.sum(b_g2 * (b_z2 - b_norm[0]), axis=0), o_e, m_e, E)


@kernel
def leff_weight_gradient_kernel(
    p_a, p_z, p_rows, p_tokens, p_partial, p_x, p_gram, p_sums, M, HW, ROWS,
    P: tl.constexpr, PX: tl.constexpr, E: tl.constexpr, C: tl.constexpr, CX: tl.constexpr,
    STRIDE_E: tl.constexpr, STRIDE_C: tl.constexpr, UPPER: tl.constexpr,
    OPERAND: tl.constexpr, TILE_M: tl.constexpr, TILE_E: tl.constexpr, TILE_C: tl.constexpr, NUM_C: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """``partial_product`` of an operand (M, E) and tokens (B, P + HW, C), and of x (B, PX + HW, CX) by itself, in UPPER
    tiles, with its sums; where wanted.
    """
    i = tl.program_id(0)
    if p_partial is not None:
        programs = tl.cdiv(E, TILE_E) * tl.cdiv(C, NUM_C * TILE_C) * tl.cdiv(M, ROWS)
        if i < programs:
            partial_product(
                i, p_a, p_z, p_rows, p_tokens, p_partial, None, M, HW, 0, P, ROWS, E, C, STRIDE_E, STRIDE_C, 0,
                OPERAND, TILE_M, TILE_E, TILE_C, NUM_C, COMPUTE, ACC, PRECISION, EXACT,
            )  # fmt: skip
        i -= programs
    if p_gram is not None:
        # One tile of channels, since the sums take registers too.
        if i >= 0:
            partial_product(
                i, p_x, None, None, p_x, p_gram, p_sums, M, HW, PX, PX, ROWS, CX, CX, CX, ONE, UPPER,
                PLAIN, TILE_M, TILE_E, TILE_C, ONE, COMPUTE, ACC, PRECISION, EXACT,
            )  # fmt: skip


@triton.jit
def partial_product(
    i, p_a, p_z, p_rows, p_tokens, p_partial, p_sums, M, HW, PA, P, ROWS,
    E: tl.constexpr, C: tl.constexpr, STRIDE_E: tl.constexpr, STRIDE_C: tl.constexpr, UPPER: tl.constexpr,
    OPERAND: tl.constexpr, TILE_M: tl.constexpr, TILE_E: tl.constexpr, TILE_C: tl.constexpr, NUM_C: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Partial sums over ROWS tokens each of operand^T tokens, (S, E, C) or transposed by the strides, with an operand
    (B, PA + HW, E) as of ``load_operand`` and tokens (B, P + HW, C); where wanted, of the operand itself, (S, E).
    Program instance i takes NUM_C tiles of TILE_C channels of the tokens. Of a symmetric product UPPER tiles are
    computed, one a program instance, and stored for the others too; where UPPER is 0, all are.

    The GEMM is computed as tokens^T operand: the operand is then what tensor cores read from shared memory, once it is
    computed, for all tiles.
    """
    NE: tl.constexpr = (E + TILE_E - 1) // TILE_E
    NC: tl.constexpr = (C + NUM_C * TILE_C - 1) // (NUM_C * TILE_C)
    if UPPER:
        i_s, i_c, i_e = i // UPPER, i % UPPER, 0
        for r in tl.static_range(NE - 1):
            goes_on = ((i_e == r) & (i_c >= NC - r * TILE_E // TILE_C)).to(tl.int32)
            i_c -= goes_on * (NC - r * TILE_E // TILE_C)
            i_e += goes_on
        first = i_e * TILE_E // TILE_C
        i_c += first
    else:
        i_s, i_c, i_e, first = i // (NE * NC), i // NE % NC, i % NE, 0
    o_e = i_e * TILE_E + tl.arange(0, TILE_E)
    o_c = i_c * (NUM_C * TILE_C) + tl.arange(0, TILE_C)
    m_e = o_e < E
    b_sums = zeros(TILE_C, TILE_E, NUM_C, ACC)
    b_total = tl.zeros((TILE_M, TILE_E), dtype=ACC)
    for k in range(tl.cdiv(tl.minimum(ROWS, M - i_s * ROWS), TILE_M)):
        m = i_s * ROWS + k * TILE_M
        o_m = m + tl.arange(0, TILE_M)
        m_m = (o_m < M)[:, None]
        row, o_t = token_rows(o_m, m, HW, PA)
        offsets = row * E + (o_t[:, None] * E + o_e[None, :])
        b_a = load_operand(p_a, p_z, p_rows, offsets, m_m & m_e[None, :], o_e, m_e, E, OPERAND, COMPUTE, ACC, EXACT)
        if p_sums is not None:
            b_a = compute_once(b_a)
            b_total += b_a.to(ACC)
        row, o_t = token_rows(o_m, m, HW, P)
        p_tile = p_tokens + row * C + (o_t[:, None] * C + o_c[None, :])
        b_new = ()
        for j in tl.static_range(NUM_C):
            b_tokens = tl.load(p_tile + j * TILE_C, mask=m_m & (o_c + j * TILE_C < C)[None, :], other=0.0)
            b_tokens = tl.trans(b_tokens.to(COMPUTE))
            b_new = b_new + (tl.dot(b_tokens, b_a, b_sums[j], input_precision=PRECISION, out_dtype=ACC),)
        b_sums = b_new
    p_tile = p_partial + i_s * (E * C) + o_c[:, None] * STRIDE_C + o_e[None, :] * STRIDE_E
    for j in tl.static_range(NUM_C):
        tl.store(p_tile + j * TILE_C * STRIDE_C, b_sums[j], mask=(o_c + j * TILE_C < C)[:, None] & m_e[None, :])
    if UPPER:
        # Where no program instance has the tile.
        lower = (o_e // TILE_C)[None, :] < (o_c // TILE_E * TILE_E // TILE_C)[:, None]
        p_tile = p_partial + i_s * (E * C) + o_c[:, None] * STRIDE_E + o_e[None, :] * STRIDE_C
        tl.store(p_tile, b_sums[0], mask=lower & (o_c < C)[:, None] & m_e[None, :])
    if p_sums is not None:
        tl.store(p_sums + i_s * E + o_e, tl.sum(b_total, axis=0), mask=m_e & (i_c == first))
