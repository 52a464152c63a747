"""Inference, with each BatchNorm as a scale and a shift per channel behind its convolution.

expand     h = act(scale_1 x W_1^T + shift_1), a GEMM that reads the tokens in place
contract   out = scale_3 act(dw(h)) W_3^T + shift_3 (+ residual), where the depthwise convolution dw with its norm is
           computed as the GEMM's operand: its result never reaches memory. The prefix tokens pass through in the
           same launch.

Program instances compute scale and shift of their channels from the parameters of the call. Only those of the depthwise
convolution, which every program instance of contract would need again for all channels, are computed once, by expand.
"""

import triton
import triton.language as tl

from ...common.activations import activate
from ...common.kernel import kernel
from .kernels_common import pass_prefix, scale_and_shift, zeros

__all__ = ["leff_contract_kernel", "leff_expand_kernel"]


@kernel
def leff_expand_kernel(
    p_x, p_weight1, p_bias1, p_norm_weight1, p_norm_bias1, p_running_mean1, p_running_var1, p_h,
    p_weight2, p_bias2, p_norm_weight2, p_norm_bias2, p_running_mean2, p_running_var2, p_rows2,
    M, HW, eps1: tl.float64, eps2: tl.float64,
    P: tl.constexpr, C: tl.constexpr, E: tl.constexpr, KERNEL: tl.constexpr, ACTIVATION: tl.constexpr,
    TILE_M: tl.constexpr, TILE_E: tl.constexpr, TILE_C: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """h (M, E) from x (B, P + HW, C), weight1 (E, C) and the vectors (E,) of the first layer; M = B * HW.

    The program instances behind those of the tokens make rows2 (KERNEL^2 + 1, E) for ``leff_contract_kernel`` from
    weight2 (E, KERNEL^2) and the vectors (E,) of the second layer: the taps by the norm's scale, with neighbouring
    channels side by side, and its shift.
    """
    # Neighbours in launch order share their rows of x, which then come from cache.
    i_m = tl.program_id(0) // tl.cdiv(E, TILE_E)
    o_m = i_m * TILE_M + tl.arange(0, TILE_M)
    o_e = tl.program_id(0) % tl.cdiv(E, TILE_E) * TILE_E + tl.arange(0, TILE_E)
    m_m, m_e = o_m < M, o_e < E
    if i_m >= tl.cdiv(M, TILE_M):
        vectors2 = (p_bias2, p_norm_weight2, p_norm_bias2, p_running_mean2, p_running_var2)
        _store_rows2(p_rows2, p_weight2, vectors2, eps2, o_e, m_e, E, KERNEL, TILE_E, ACC)
    else:
        p_rows = p_x + (o_m + (o_m // HW + 1) * P).to(tl.int64)[:, None] * C
        b_h = tl.zeros((TILE_M, TILE_E), dtype=ACC)
        for c in range(0, C, TILE_C):
            o_c = c + tl.arange(0, TILE_C)
            m_c = (o_c < C)[None, :]
            b_x = tl.load(p_rows + o_c[None, :], mask=m_m[:, None] & m_c, other=0.0).to(COMPUTE)  # [TILE_M, TILE_C]
            b_weight = tl.load(p_weight1 + o_e[:, None] * C + o_c[None, :], mask=m_e[:, None] & m_c, other=0.0)
            b_h = tl.dot(b_x, tl.trans(b_weight), b_h, input_precision=PRECISION, out_dtype=ACC)
        vectors1 = (p_bias1, p_norm_weight1, p_norm_bias1, p_running_mean1, p_running_var1)
        b_scale, b_shift = scale_and_shift(vectors1, eps1, o_e, m_e, TILE_E, ACC)
        b_h = activate(b_h * b_scale[None, :] + b_shift[None, :], ACTIVATION, EXACT)
        tl.store(p_h + o_m.to(tl.int64)[:, None] * E + o_e[None, :], b_h.to(COMPUTE), mask=m_m[:, None] & m_e[None, :])


@kernel
def leff_contract_kernel(
    p_h, p_rows2, p_weight3, p_bias3, p_norm_weight3, p_norm_bias3, p_running_mean3, p_running_var3,
    p_x, p_residual, p_out, B, H, W, eps3: tl.float64,
    P: tl.constexpr, E: tl.constexpr, O: tl.constexpr, KERNEL: tl.constexpr, ACTIVATION: tl.constexpr,
    TILE_P: tl.constexpr, TILE_E: tl.constexpr, TILE_O: tl.constexpr, NUM_O: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out (B, P + HW, O) from h (B * HW, E), rows2 (KERNEL^2 + 1, E), weight3 (O, E) and the last layer's vectors (O,).

    A program instance takes TILE_P patches of two by two outputs, for which 16 loads of h do where four outputs by
    themselves have 36 taps of side 3, and NUM_O tiles of TILE_O output channels. The GEMM is computed as
    W_3 h2^T: h2 is then the operand that every warp reads from shared memory, and no warp computes it twice.
    """
    rows, columns = (H + 1) // 2, (W + 1) // 2
    patches = B * rows * columns
    # Neighbours in launch order share their patches, which then come from cache.
    i_p = tl.program_id(0) // tl.cdiv(O, NUM_O * TILE_O)
    o_o = tl.program_id(0) % tl.cdiv(O, NUM_O * TILE_O) * (NUM_O * TILE_O) + tl.arange(0, TILE_O)
    if i_p >= tl.cdiv(patches, TILE_P):
        i_p -= tl.cdiv(patches, TILE_P)
        for i_o in tl.static_range(NUM_O):
            pass_prefix(p_x, p_residual, p_out, i_p, o_o + i_o * TILE_O, B, H * W, P, O, 4 * TILE_P)
    else:
        o_p = i_p * TILE_P + tl.arange(0, TILE_P)
        o_x = o_p % columns * 2
        o_y = o_p // columns % rows * 2
        m_p = o_p < patches
        p_rows = p_h + ((o_p // columns // rows * H + o_y) * W + o_x).to(tl.int64)[:, None] * E

        b_outs = zeros(TILE_O, 4 * TILE_P, NUM_O, ACC)
        for e in range(0, E, TILE_E):
            o_e = e + tl.arange(0, TILE_E)
            m_e = o_e < E
            # All loads of a step before the first use, so that one wait for memory serves them all; where they are too
            # many for the registers, those of a row of the patch.
            ROWS: tl.constexpr = KERNEL + 1 if KERNEL == 3 else 1
            b_weights, b_taps = (), ()
            for i_o in tl.static_range(NUM_O):
                b_weights = b_weights + (_load_weight(p_weight3, o_o + i_o * TILE_O, o_e, E, O),)
            if KERNEL == 3:
                for k in tl.static_range(KERNEL * KERNEL):
                    b_taps = b_taps + (_load_row(p_rows2 + k * E, o_e, m_e),)
            b_shift = tl.zeros((TILE_P, TILE_E), dtype=ACC) + _load_row(p_rows2 + KERNEL * KERNEL * E, o_e, m_e)
            b_patch = (b_shift, b_shift, b_shift, b_shift)
            for first in tl.static_range(0, KERNEL + 1, ROWS):
                b_rows = ()
                for k in tl.static_range(ROWS * (KERNEL + 1)):
                    dy, dx = first + k // (KERNEL + 1) - KERNEL // 2, k % (KERNEL + 1) - KERNEL // 2
                    m_in = m_p & (o_y + dy >= 0) & (o_y + dy < H) & (o_x + dx >= 0) & (o_x + dx < W)
                    p_in = p_rows + ((dy * W + dx) * E + o_e)[None, :]
                    b_rows = b_rows + (tl.load(p_in, mask=m_in[:, None] & m_e[None, :], other=0.0),)  # [TILE_P, TILE_E]
                for k in tl.static_range(ROWS * (KERNEL + 1)):
                    b_h, b_sums = b_rows[k].to(ACC), ()
                    for i in tl.static_range(4):
                        if _tap(first * (KERNEL + 1) + k, i, KERNEL) < 0:
                            b_sums = b_sums + (b_patch[i],)
                        elif KERNEL == 3:
                            b_sums = b_sums + (b_patch[i] + b_h * b_taps[_tap(k, i, KERNEL)],)
                        else:
                            p_tap = p_rows2 + _tap(first * (KERNEL + 1) + k, i, KERNEL) * E
                            b_sums = b_sums + (b_patch[i] + b_h * _load_row(p_tap, o_e, m_e),)
                    b_patch = b_sums
            b_h2 = ()
            for i in tl.static_range(4):
                b_h2 = b_h2 + (activate(b_patch[i], ACTIVATION, EXACT).to(COMPUTE),)
            b_h2 = tl.join(tl.join(b_h2[0], b_h2[1]), tl.join(b_h2[2], b_h2[3]))  # [TILE_P, TILE_E, 2 columns, 2 rows]
            b_h2 = tl.reshape(tl.permute(b_h2, (0, 3, 2, 1)), (4 * TILE_P, TILE_E))
            b_h2 = tl.trans(b_h2)  # [TILE_E, 4 * TILE_P]
            b_sums = ()
            for k in tl.static_range(NUM_O):
                b_sums = b_sums + (tl.dot(b_weights[k], b_h2, b_outs[k], input_precision=PRECISION, out_dtype=ACC),)
            b_outs = b_sums

        # Outputs 4 q to 4 q + 3 are those of patch q, row by row.
        o_i = tl.arange(0, 4 * TILE_P)
        o_q = i_p * TILE_P + o_i // 4
        o_x = o_q % columns * 2 + o_i % 2
        o_y = o_q // columns % rows * 2 + o_i // 2 % 2
        i_b = o_q // columns // rows
        o_t = (i_b * H + o_y) * W + o_x + (i_b + 1) * P
        m_t = (o_q < patches) & (o_y < H) & (o_x < W)
        vectors3 = (p_bias3, p_norm_weight3, p_norm_bias3, p_running_mean3, p_running_var3)
        for k in tl.static_range(NUM_O):
            _store_tile(p_out, p_residual, vectors3, eps3, b_outs[k], o_t, m_t, o_o + k * TILE_O, O, TILE_O, ACC)


@triton.constexpr_function
def _tap(i, output, KERNEL):
    """The tap by which input i of a patch's (KERNEL + 1)^2 counts for one of its four outputs, -1 if it does not."""
    row, column = i // (KERNEL + 1) - output // 2, i % (KERNEL + 1) - output % 2
    return row * KERNEL + column if 0 <= row < KERNEL and 0 <= column < KERNEL else -1


@triton.jit
def _store_rows2(
    p_rows2, p_weight2, vectors, eps, o_e, m_e, E: tl.constexpr, KERNEL: tl.constexpr, TILE_E: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The rows of TILE_E channels, all taps in one load."""
    b_scale, b_shift = scale_and_shift(vectors, eps, o_e, m_e, TILE_E, ACC)
    TAPS: tl.constexpr = KERNEL * KERNEL
    o_k = tl.arange(0, 16 if KERNEL == 3 else 64)[:, None]
    mask = (o_k < TAPS) & m_e[None, :]
    b_taps = tl.load(p_weight2 + o_e[None, :] * TAPS + o_k, mask=mask, other=0.0).to(ACC)
    tl.store(p_rows2 + o_k * E + o_e[None, :], b_taps * b_scale[None, :], mask=mask)
    tl.store(p_rows2 + TAPS * E + o_e, b_shift, mask=m_e)


@triton.jit
def _load_row(p_row, o_e, m_e):
    return tl.load(p_row + o_e[None, :], mask=m_e[None, :], other=0.0)  # [1, TILE_E]


@triton.jit
def _load_weight(p_weight, o_o, o_e, E: tl.constexpr, O: tl.constexpr):
    mask = (o_o < O)[:, None] & (o_e < E)[None, :]
    return tl.load(p_weight + o_o[:, None] * E + o_e[None, :], mask=mask, other=0.0)  # [TILE_O, TILE_E]


@triton.jit
def _store_tile(
    p_out, p_residual, vectors, eps, b_out, o_t, m_t, o_o,
    O: tl.constexpr, TILE_O: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scale and shift a tile of channels by tokens, add the residual, and store it as tokens by channels."""
    b_scale, b_shift = scale_and_shift(vectors, eps, o_o, o_o < O, TILE_O, ACC)
    b_out = tl.trans(b_out * b_scale[:, None] + b_shift[:, None])
    offsets = o_t.to(tl.int64)[:, None] * O + o_o[None, :]
    mask = m_t[:, None] & (o_o < O)[None, :]
    if p_residual is not None:
        b_out += tl.load(p_residual + offsets, mask=mask, other=0.0).to(b_out.dtype)
    tl.store(p_out + offsets, b_out.to(p_out.dtype.element_ty), mask=mask)
