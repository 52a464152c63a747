"""The gradients of x and of the first weight in 16 bits, without forming the gradient of z1.

Behind a norm of this batch, dz1 = a g1 + b (z1 - mean) + c, and z1 - mean = (x - mean x) W_1^T. So

    dx     = dz1 W_1   = g1 (a W_1) + (x - mean x) (W_1^T b W_1) + c W_1
    dW_1   = dz1^T x   = a g1^T x + b W_1 cov x + c sum x,     cov x = x^T x - sum x sum x^T / M

in which nothing has the hidden width but g1: z1 is not read again, and both GEMMs take their operands as they come.
"""

import triton
import triton.language as tl

from ...common.kernel import kernel
from .kernels_common import ONE, PLAIN, compute_once, gradient_rows
from .kernels_gemm import contract_operand, partial_product
from .kernels_reduce import sum_parts

__all__ = ["leff_factored_gradient_kernel", "leff_factored_product_kernel"]


@kernel
def leff_factored_product_kernel(
    p_a, p_tokens, p_partial, p_weight, p_gradient, p_folded, p_tail, p_bias, M, HW, ROWS,
    P: tl.constexpr, C: tl.constexpr, E: tl.constexpr, TILE_M: tl.constexpr, TILE_E: tl.constexpr, TILE_C: tl.constexpr,
    NUM_C: tl.constexpr, FOLD_E: tl.constexpr, FOLD_C: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """What does not wait for one another: a W_1 with what belongs to it, and partial sums (S, E, C) of g1^T x, from g1
    (M, E), x (B, P + HW, C), W_1 and the ``gradient`` array; where wanted.
    """
    i = tl.program_id(0)
    if p_folded is not None:
        columns: tl.constexpr = (C + FOLD_C - 1) // FOLD_C
        # They take few program instances and long, so they start first.
        programs: tl.constexpr = columns if p_tail is None else columns * columns
        if i < programs:
            _fold(i, p_weight, p_gradient, p_folded, p_tail, p_bias, C, E, FOLD_E, FOLD_C, COMPUTE, ACC, PRECISION)
        i -= programs
    if p_partial is not None:
        if i >= 0:
            partial_product(
                i, p_a, None, None, p_tokens, p_partial, None, M, HW, 0, P, ROWS, E, C, C, ONE, 0,
                PLAIN, TILE_M, TILE_E, TILE_C, NUM_C, COMPUTE, ACC, PRECISION, EXACT,
            )  # fmt: skip


@kernel
def leff_factored_gradient_kernel(
    p_a, p_folded, p_tail, p_bias, p_tokens, p_all_sums, p_total, p_out, p_prefix,
    p_partial, p_weight, p_gradient, p_gram, p_sums, p_dweight, p_taps_gradient, p_dweight2, B, M, HW, S, T,
    P: tl.constexpr, C: tl.constexpr, E: tl.constexpr, TILE_M: tl.constexpr, TILE_E: tl.constexpr, TILE_O: tl.constexpr,
    NUM_O: tl.constexpr, WEIGHT_E: tl.constexpr, WEIGHT_C: tl.constexpr, KERNEL: tl.constexpr, TILE_S: tl.constexpr,
    TILE_N: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, SHORT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The gradients (E, C) of W_1, as ``_first_weight`` has it, of the taps, (E, KERNEL^2), from T partial ones, and of
    x, (B, P + HW, C), where wanted.
    """
    i = tl.program_id(0)
    NE: tl.constexpr = 0 if p_dweight is None else (E + WEIGHT_E - 1) // WEIGHT_E
    weights: tl.constexpr = NE * ((C + WEIGHT_C - 1) // WEIGHT_C)
    TAPS: tl.constexpr = KERNEL * KERNEL
    taps: tl.constexpr = 0 if p_dweight2 is None else (E * TAPS + TILE_N - 1) // TILE_N
    if i < weights + taps:
        if p_dweight is not None:
            if i < weights:
                _first_weight(
                    i, p_partial, p_weight, p_gradient, p_gram, p_sums, p_all_sums, p_total, p_dweight, S,
                    C, E, WEIGHT_E, WEIGHT_C, ACC, SHORT,
                )  # fmt: skip
        sum_parts(p_taps_gradient, p_dweight2, T, E * TAPS, i - weights, TAPS, TILE_S, TILE_N, ACC)
    i -= weights + taps
    if p_out is not None:
        if i >= 0:
            contract_operand(
                i, p_a, None, None, p_folded, p_bias, None, p_tokens, p_all_sums, p_total, p_tail, p_out, p_prefix,
                None, None, None, B, M, HW, P, E, C, ONE, C, PLAIN, TILE_M, TILE_E, TILE_O, NUM_O,
                COMPUTE, ACC, PRECISION, EXACT,
            )  # fmt: skip


@triton.jit
def _fold(
    i, p_weight, p_gradient, p_folded, p_tail, p_bias,
    C: tl.constexpr, E: tl.constexpr, TILE_E: tl.constexpr, TILE_C: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a W_1 (E, C); with a tail also this, W_1^T b W_1 (C, C), and c W_1 (C,)."""
    i_r, i_c = i // tl.cdiv(C, TILE_C), i % tl.cdiv(C, TILE_C)
    o_r = i_r * TILE_C + tl.arange(0, TILE_C)
    o_c = i_c * TILE_C + tl.arange(0, TILE_C)
    m_r, m_c = o_r < C, o_c < C
    b_tail = tl.zeros((TILE_C, TILE_C), dtype=ACC)
    b_bias = tl.zeros((TILE_C,), dtype=ACC)
    for e in range(0, E, TILE_E):
        o_e = e + tl.arange(0, TILE_E)
        m_e = o_e < E
        offsets = o_e[:, None] * C + o_c[None, :]
        mask = m_e[:, None] & m_c[None, :]
        b_weight = tl.load(p_weight + offsets, mask=mask, other=0.0)  # [TILE_E, TILE_C]
        _, b_a, b_b, b_c = gradient_rows(p_gradient, o_e[:, None], m_e[:, None], E)
        if i_r == 0:
            tl.store(p_folded + offsets, (b_weight.to(ACC) * b_a).to(COMPUTE), mask=mask)
            if p_tail is not None:
                b_bias += tl.sum(b_weight.to(ACC) * b_c, axis=0)
        if p_tail is not None:
            b_left = tl.load(p_weight + o_e[:, None] * C + o_r[None, :], mask=m_e[:, None] & m_r[None, :], other=0.0)
            b_right = compute_once((b_weight.to(ACC) * b_b).to(COMPUTE))
            b_tail = tl.dot(tl.trans(b_left), b_right, b_tail, input_precision=PRECISION, out_dtype=ACC)
    if p_tail is not None:
        tl.store(p_tail + o_r[:, None] * C + o_c[None, :], b_tail.to(COMPUTE), mask=m_r[:, None] & m_c[None, :])
        if i_r == 0:
            tl.store(p_bias + o_c, b_bias, mask=m_c)


@triton.jit
def _first_weight(
    i, p_partial, p_weight, p_gradient, p_gram, p_sums, p_all_sums, p_total, p_out, S,
    C: tl.constexpr, E: tl.constexpr, TILE_E: tl.constexpr, TILE_C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW_1 (E, C) from partial sums (S, E, C) of g1^T x and, behind a norm of this batch, from x^T x (C, C), the sums
    (C,) of x, and those over the total (1,) of tokens that the norm took, which may be other processes' too.
    """
    o_e = i // tl.cdiv(C, TILE_C) * TILE_E + tl.arange(0, TILE_E)
    o_c = i % tl.cdiv(C, TILE_C) * TILE_C + tl.arange(0, TILE_C)
    m_e, m_c = o_e < E, o_c < C
    offsets = o_e[:, None] * C + o_c[None, :]
    mask = m_e[:, None] & m_c[None, :]
    b_sum = tl.zeros((TILE_E, TILE_C), dtype=ACC)
    for s in range(S):
        b_sum += tl.load(p_partial + s * (E * C) + offsets, mask=mask, other=0.0)
    _, b_a, b_b, b_c = gradient_rows(p_gradient, o_e[:, None], m_e[:, None], E)
    b_sum *= b_a
    if p_gram is not None:
        b_right = tl.load(p_sums + o_c, mask=m_c, other=0.0)
        b_weighted = tl.zeros((TILE_E, TILE_C), dtype=ACC)
        for k in range(0, C, TILE_E):
            o_k = k + tl.arange(0, TILE_E)
            m_k = o_k < C
            b_left = tl.load(p_all_sums + o_k, mask=m_k, other=0.0) / tl.load(p_total)
            b_cov = tl.load(p_gram + o_k[:, None] * C + o_c[None, :], mask=m_k[:, None] & m_c[None, :], other=0.0)
            b_cov -= b_left[:, None] * b_right[None, :]
            m_w = m_e[:, None] & m_k[None, :]
            b_weight = tl.load(p_weight + o_e[:, None] * C + o_k[None, :], mask=m_w, other=0.0).to(ACC)
            b_weighted = tl.dot(b_weight, b_cov, b_weighted, input_precision=PRECISION, out_dtype=ACC)
        b_sum += b_weighted * b_b + b_c * b_right[None, :]
    tl.store(p_out + offsets, b_sum.to(p_out.dtype.element_ty), mask=mask)
