"""Device code of the gradient of queries, keys and values as one projection with a bias writes them, and of that of the
bias of the projection behind attention, which is summed beside it.

Names: ``p_`` pointer, ``i_`` index of a program instance, ``o_`` offsets, ``m_`` mask, ``b_`` a tile in registers with
its shape behind it. A program instance holds whole rows of the queries, the keys, the values or the result, TILE_R at a
time, as two halves of E and C - E channels, padded to TILE_E. The rows of tokens (B, N, C) follow one another.
"""

import triton.language as tl

from ...common.kernel import kernel
from ...common.partials import store_rows, sum_by_last

__all__ = ["qkv_gradient_kernel"]


@kernel
def qkv_gradient_kernel(
    p_dq, p_dk, p_dv, p_dout, p_dqkv, p_dbias, p_dout_bias, p_partial, p_tickets, M, N, QUERIES, ROWS, T, GROUP,
    C: tl.constexpr, E: tl.constexpr, TICKETS: tl.constexpr, TILE_T: tl.constexpr, TILE_R: tl.constexpr,
    TILE_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dqkv (M, 3, C) of dq (B, QUERIES, C), that of the first of N tokens, dk and dv (M, C), and where wanted the sums
    over the rows, dbias (3, C) of it and dout_bias (C,) of dout (B, QUERIES, C), from partial sums (3 or 4, T + groups,
    2, E) over ROWS rows each.
    """
    i_t, i_part = tl.program_id(0), tl.program_id(1)
    p_part, tokens = p_dk, N
    if i_part == 0:
        p_part, tokens = p_dq, QUERIES
    if i_part == 2:
        p_part = p_dv
    if p_dout is not None:
        if i_part == 3:
            p_part, tokens = p_dout, QUERIES
    o_e = tl.arange(0, TILE_E)
    m_0, m_1 = o_e < E, o_e < C - E
    b_0, b_1 = tl.zeros((TILE_R, TILE_E), dtype=ACC), tl.zeros((TILE_R, TILE_E), dtype=ACC)
    for k in range(tl.cdiv(tl.minimum(ROWS, M - i_t * ROWS), TILE_R)):
        o_m = i_t * ROWS + k * TILE_R + tl.arange(0, TILE_R)
        o_n = o_m % N
        m_row, m_given = (o_m < M)[:, None], ((o_m < M) & (o_n < tokens))[:, None]
        p_from = p_part + ((o_m // N).to(tl.int64) * tokens + o_n)[:, None] * C + o_e[None, :]
        b_first = tl.load(p_from, mask=m_given & m_0[None, :], other=0.0)
        b_second = tl.load(p_from + E, mask=m_given & m_1[None, :], other=0.0)
        if p_dqkv is not None:
            p_to = p_dqkv + o_m.to(tl.int64)[:, None] * (3 * C) + i_part * C + o_e[None, :]
            m_to = m_row & (i_part < 3)
            tl.store(p_to, b_first, mask=m_to & m_0[None, :])
            tl.store(p_to + E, b_second, mask=m_to & m_1[None, :])
        if p_partial is not None:
            b_0 += b_first.to(ACC)
            b_1 += b_second.to(ACC)
    if p_partial is not None:
        p_sums = p_partial + i_part * ((T + tl.cdiv(T, GROUP)) * (2 * E))
        store_rows(p_sums, i_t, tl.sum(b_0, axis=0), tl.sum(b_1, axis=0), o_e, m_0, E)
        p_counters = p_tickets + i_part * TICKETS
        last, b_first_sum, b_second_sum = sum_by_last(
            p_sums, p_counters, i_t, T, GROUP, o_e, m_0, E, TILE_T, TILE_E, ACC
        )
        if last:
            if p_dbias is not None:
                p_bias, m_bias = p_dbias + i_part * C + o_e, i_part < 3
                tl.store(p_bias, b_first_sum.to(p_dbias.dtype.element_ty), mask=m_0 & m_bias)
                tl.store(p_bias + E, b_second_sum.to(p_dbias.dtype.element_ty), mask=m_1 & m_bias)
            if p_dout_bias is not None:
                p_bias, m_bias = p_dout_bias + o_e, i_part == 3
                tl.store(p_bias, b_first_sum.to(p_dout_bias.dtype.element_ty), mask=m_0 & m_bias)
                tl.store(p_bias + E, b_second_sum.to(p_dout_bias.dtype.element_ty), mask=m_1 & m_bias)
