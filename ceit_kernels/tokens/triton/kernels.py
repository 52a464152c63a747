"""Device code of tokens that are put together with their positions, and of the sums over images in their gradient.

Names: ``p_`` pointer, ``i_`` index of a program instance, ``o_`` offsets, ``m_`` mask, ``b_`` a tile in registers with
its shape behind it.
"""

import triton
import triton.language as tl

from ...common.kernel import kernel

__all__ = ["column_sums_kernel", "join_tokens_kernel"]


@kernel
def join_tokens_kernel(
    p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, p_8, p_9, p_10, p_11, p_12, p_13, p_14, p_15, p_added, p_positions, p_out,
    M, N, STRIDE, COUNT: tl.constexpr, C: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out (B, N, C): a token of each of COUNT - 1 tensors, whose images are STRIDE apart, and all of the last, to which
    another may be added, with positions (N, C). A program instance has TILE_R of M = B * N rows, of channels padded to
    TILE_C.
    """
    p_tokens = (p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, p_8, p_9, p_10, p_11, p_12, p_13, p_14, p_15)
    o_m = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    o_c = tl.arange(0, TILE_C)[None, :]
    mask = (o_m < M)[:, None] & (o_c < C)
    o_b, o_n = (o_m // N).to(tl.int64), o_m % N
    b_out = tl.load(p_positions + o_n[:, None] * C + o_c, mask=mask, other=0.0).to(ACC)
    for k in tl.static_range(COUNT - 1):
        m_k = mask & (o_n == k)[:, None]
        b_out += tl.load(p_tokens[k] + (o_b * STRIDE)[:, None] + o_c, mask=m_k, other=0.0).to(ACC)
    o_last = (o_b * (N - COUNT + 1) + o_n - (COUNT - 1))[:, None] * C + o_c
    m_last = mask & (o_n >= COUNT - 1)[:, None]
    b_last = tl.load(p_tokens[COUNT - 1] + o_last, mask=m_last, other=0.0)
    if p_added is not None:
        b_last = (b_last.to(ACC) + tl.load(p_added + o_last, mask=m_last, other=0.0).to(ACC)).to(b_last.dtype)
    b_out += b_last.to(ACC)
    p_to = p_out + o_m.to(tl.int64)[:, None] * C + o_c
    tl.store(p_to, b_out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _sum_columns(
    p_rows, p_sum, p_first, p_rest, B, COLUMNS, FIRST,
    TILE_B: tl.constexpr, TILE_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of the sums of rows (B, COLUMNS); first has the FIRST first ones too, rest the other columns' elements."""
    o_c = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    m_c = o_c < COLUMNS
    b_sum = tl.zeros((TILE_B, TILE_C), dtype=ACC)
    for b in range(0, B, TILE_B):
        o_b = (b + tl.arange(0, TILE_B)).to(tl.int64)[:, None]
        mask = (o_b < B) & m_c[None, :]
        b_rows = tl.load(p_rows + o_b * COLUMNS + o_c[None, :], mask=mask, other=0.0)
        b_sum += b_rows.to(ACC)
        if p_rest is not None:
            p_to = p_rest + o_b * (COLUMNS - FIRST) + (o_c - FIRST)[None, :]
            tl.store(p_to, b_rows.to(p_rest.dtype.element_ty), mask=mask & (o_c >= FIRST)[None, :])
    b_total = tl.sum(b_sum, axis=0)
    if p_sum is not None:
        tl.store(p_sum + o_c, b_total.to(p_sum.dtype.element_ty), mask=m_c)
    if p_first is not None:
        tl.store(p_first + o_c, b_total.to(p_first.dtype.element_ty), mask=m_c & (o_c < FIRST))


@kernel
def column_sums_kernel(
    p_rows0, p_rows1, p_rows2, p_rows3, p_sum0, p_sum1, p_sum2, p_sum3, p_first, p_rest, B, COLUMNS0, COLUMNS1,
    COLUMNS2, COLUMNS3, FIRST, TILE_B: tl.constexpr, TILE_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over the B rows of up to four matrices; of the first also those of the FIRST columns alone, and the others'
    elements. A program instance has TILE_C columns of one matrix, and takes TILE_B rows at a time.
    """
    i, start = tl.program_id(1), tl.program_id(0) * TILE_C
    if (i == 0) & (start < COLUMNS0):
        _sum_columns(p_rows0, p_sum0, p_first, p_rest, B, COLUMNS0, FIRST, TILE_B, TILE_C, ACC)
    if p_rows1 is not None:
        if (i == 1) & (start < COLUMNS1):
            _sum_columns(p_rows1, p_sum1, None, None, B, COLUMNS1, FIRST, TILE_B, TILE_C, ACC)
    if p_rows2 is not None:
        if (i == 2) & (start < COLUMNS2):
            _sum_columns(p_rows2, p_sum2, None, None, B, COLUMNS2, FIRST, TILE_B, TILE_C, ACC)
    if p_rows3 is not None:
        if (i == 3) & (start < COLUMNS3):
            _sum_columns(p_rows3, p_sum3, None, None, B, COLUMNS3, FIRST, TILE_B, TILE_C, ACC)
