"""The kernels of LeFF's inference that an H100 was measured with, as they were, and what it took for them.

One table in ``benchmarks/NOTES.md``, batch 256, bfloat16; the model is calibrated on it.
"""

import torch
import triton
import triton.language as tl

from ceit_kernels.common.activations import activate
from ceit_kernels.common.launch import Launch, cdiv
from ceit_kernels.common.precision import precision_arguments

from .kernels import Kernel, by_unit, l2, patches, shared_by

MICROSECONDS = {192: 326, 384: 1259}  # by channels, of both launches


@triton.jit
def leff_expand_kernel(
    p_x, p_weight, p_bias, p_h, M, HW, P,
    C: tl.constexpr, E: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """h (M, E) from x (B, P + HW, C), weight (E, C) and bias (E,); M = B * HW."""
    # Neighbours in launch order share their rows of x, which then come from cache.
    o_m = tl.program_id(0) // tl.cdiv(E, BE) * BM + tl.arange(0, BM)
    o_e = tl.program_id(0) % tl.cdiv(E, BE) * BE + tl.arange(0, BE)
    m_m, m_e = o_m < M, o_e < E
    p_rows = p_x + (o_m + (o_m // HW + 1) * P).to(tl.int64)[:, None] * C

    b_h = tl.zeros((BM, BE), dtype=ACC)
    for c in range(0, C, BC):
        o_c = c + tl.arange(0, BC)
        m_c = (o_c < C)[None, :]
        b_x = tl.load(p_rows + o_c[None, :], mask=m_m[:, None] & m_c, other=0.0).to(COMPUTE)  # [BM, BC]
        b_weight = tl.load(p_weight + o_e[:, None] * C + o_c[None, :], mask=m_e[:, None] & m_c, other=0.0)  # [BE, BC]
        b_h = tl.dot(b_x, tl.trans(b_weight), b_h, input_precision=PRECISION, out_dtype=ACC)
    b_h += tl.load(p_bias + o_e, mask=m_e, other=0.0)[None, :]
    b_h = activate(b_h, ACTIVATION, EXACT).to(COMPUTE)
    tl.store(p_h + o_m.to(tl.int64)[:, None] * E + o_e[None, :], b_h, mask=m_m[:, None] & m_e[None, :])


@triton.jit
def leff_contract_kernel(
    p_h, p_taps, p_bias2, p_weight, p_bias3, p_x, p_residual, p_out, B, H, W, P,
    E: tl.constexpr, O: tl.constexpr, KERNEL: tl.constexpr, ACTIVATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BX: tl.constexpr, BE: tl.constexpr, BO: tl.constexpr, NO: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out (B, P + HW, O) from h (B * HW, E), taps (KERNEL^2, E), weight (O, E) and the biases (E,) and (O,).

    A program instance takes BX places of the image, two rows high, so that every load of h serves two outputs, and NO
    blocks of BO output channels. The product is taken as W_3 h2^T: h2 is then the operand that every warp reads from
    shared memory, and no warp computes it twice.
    """
    half_rows = (H + 1) // 2
    places = B * half_rows * W
    i_p = tl.program_id(0)
    o_o = tl.program_id(1) * (NO * BO) + tl.arange(0, BO)
    if i_p >= tl.cdiv(places, BX):
        i_p -= tl.cdiv(places, BX)
        for i_o in tl.static_range(NO):
            _pass_prefix(p_x, p_residual, p_out, i_p, o_o + i_o * BO, B, H * W, P, O, HAS_RESIDUAL, 2 * BX)
    else:
        o_p = i_p * BX + tl.arange(0, BX)
        o_x = o_p % W
        o_y = o_p // W % half_rows * 2
        m_p = o_p < places
        p_rows = p_h + ((o_p // W // half_rows * H + o_y) * W + o_x).to(tl.int64)[:, None] * E

        b_out0 = tl.zeros((BO, 2 * BX), dtype=ACC)
        if NO > 1:
            b_out1 = tl.zeros((BO, 2 * BX), dtype=ACC)
        if NO > 2:
            b_out2 = tl.zeros((BO, 2 * BX), dtype=ACC)
        for e in range(0, E, BE):
            o_e = e + tl.arange(0, BE)
            m_e = o_e < E
            b_upper = tl.zeros((BX, BE), dtype=ACC) + tl.load(p_bias2 + o_e, mask=m_e, other=0.0)[None, :]
            b_lower = b_upper
            for j in tl.static_range(KERNEL):
                for i in tl.static_range(KERNEL + 1):
                    dy, dx = i - KERNEL // 2, j - KERNEL // 2
                    m_tap = m_p & (o_y + dy >= 0) & (o_y + dy < H) & (o_x + dx >= 0) & (o_x + dx < W)
                    p_tap = p_rows + ((dy * W + dx) * E + o_e)[None, :]
                    b_h = tl.load(p_tap, mask=m_tap[:, None] & m_e[None, :], other=0.0).to(ACC)  # [BX, BE]
                    if i < KERNEL:
                        b_upper += b_h * tl.load(p_taps + (i * KERNEL + j) * E + o_e, mask=m_e, other=0.0)[None, :]
                    if i > 0:
                        o_tap = ((i - 1) * KERNEL + j) * E + o_e
                        b_lower += b_h * tl.load(p_taps + o_tap, mask=m_e, other=0.0)[None, :]
            b_upper = activate(b_upper, ACTIVATION, EXACT).to(COMPUTE)
            b_lower = activate(b_lower, ACTIVATION, EXACT).to(COMPUTE)
            b_h2 = tl.reshape(tl.permute(tl.join(b_upper, b_lower), (0, 2, 1)), (2 * BX, BE))
            b_h2 = tl.trans(b_h2)  # [BE, 2 * BX]
            b_weight = _load_weight(p_weight, o_o, o_e, E, O)
            b_out0 = tl.dot(b_weight, b_h2, b_out0, input_precision=PRECISION, out_dtype=ACC)
            if NO > 1:
                b_weight = _load_weight(p_weight, o_o + BO, o_e, E, O)
                b_out1 = tl.dot(b_weight, b_h2, b_out1, input_precision=PRECISION, out_dtype=ACC)
            if NO > 2:
                b_weight = _load_weight(p_weight, o_o + 2 * BO, o_e, E, O)
                b_out2 = tl.dot(b_weight, b_h2, b_out2, input_precision=PRECISION, out_dtype=ACC)

        # Output 2 q is the upper and 2 q + 1 the lower row at place q.
        o_q = i_p * BX + tl.arange(0, 2 * BX) // 2
        o_y = o_q // W % half_rows * 2 + tl.arange(0, 2 * BX) % 2
        i_b = o_q // W // half_rows
        o_t = (i_b * H + o_y) * W + o_q % W + (i_b + 1) * P
        m_t = (o_q < places) & (o_y < H)
        _store_block(p_out, p_residual, p_bias3, b_out0, o_t, m_t, o_o, O, HAS_RESIDUAL)
        if NO > 1:
            _store_block(p_out, p_residual, p_bias3, b_out1, o_t, m_t, o_o + BO, O, HAS_RESIDUAL)
        if NO > 2:
            _store_block(p_out, p_residual, p_bias3, b_out2, o_t, m_t, o_o + 2 * BO, O, HAS_RESIDUAL)


@triton.jit
def _load_weight(p_weight, o_o, o_e, E: tl.constexpr, O: tl.constexpr):
    mask = (o_o < O)[:, None] & (o_e < E)[None, :]
    return tl.load(p_weight + o_o[:, None] * E + o_e[None, :], mask=mask, other=0.0)  # [BO, BE]


@triton.jit
def _store_block(p_out, p_residual, p_bias, b_out, o_t, m_t, o_o, O: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """Add the bias and the residual to a block of channels by tokens, and store it as tokens by channels."""
    m_o = o_o < O
    b_out = tl.trans(b_out) + tl.load(p_bias + o_o, mask=m_o, other=0.0)[None, :]
    offsets = o_t.to(tl.int64)[:, None] * O + o_o[None, :]
    mask = m_t[:, None] & m_o[None, :]
    if HAS_RESIDUAL:
        b_out += tl.load(p_residual + offsets, mask=mask, other=0.0).to(b_out.dtype)
    tl.store(p_out + offsets, b_out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _pass_prefix(
    p_x, p_residual, p_out, i_p, o_o, B, HW, P, O: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BP: tl.constexpr
):
    """Copy a block of BP prefix tokens, which are as wide as the output."""
    o_p = i_p * BP + tl.arange(0, BP)
    offsets = (o_p // P * (HW + P) + o_p % P).to(tl.int64)[:, None] * O + o_o[None, :]
    mask = (o_p < B * P)[:, None] & (o_o < O)[None, :]
    b_prefix = tl.load(p_x + offsets, mask=mask, other=0.0).to(p_out.dtype.element_ty)
    if HAS_RESIDUAL:
        b_prefix += tl.load(p_residual + offsets, mask=mask, other=0.0).to(p_out.dtype.element_ty)
    tl.store(p_out + offsets, b_prefix, mask=mask)


def measured_launches(channels: int, batch: int = 256) -> list[tuple[Launch, Kernel]]:
    """The two launches for images of 14 x 14 tokens and a class token."""
    side, hidden = 14, 4 * channels
    tokens = batch * side * side

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    known = {**precision_arguments(torch.bfloat16), "EXACT": False, "ACTIVATION": "gelu", "KERNEL": 3, "P": 1}
    known |= {
        "B": batch,
        "H": side,
        "W": side,
        "HW": side * side,
        "M": tokens,
        "C": channels,
        "E": hidden,
        "O": channels,
    }
    known |= {"p_x": empty(batch, side * side + 1, channels), "p_h": empty(tokens, hidden)}
    bias1, bias2, bias3 = empty(hidden).float(), empty(hidden).float(), empty(channels).float()

    def launch(kernel: triton.JITFunction, grid: tuple[int, ...], stages: int, **arguments: object) -> Launch:
        values = {**known, **arguments}
        return Launch(kernel, grid, {name: values[name] for name in kernel.arg_names}, 8, stages)

    tiles = {"BM": 128, "BE": 128, "BC": 64, "p_weight": empty(hidden, channels), "p_bias": bias1}
    expand = launch(leff_expand_kernel, (cdiv(tokens, 128) * cdiv(hidden, 128),), 3, **tiles)
    columns = 16 if channels == 384 else 64
    tiles = {"BX": 64, "BE": columns, "BO": 128 if channels == 384 else 64, "NO": 3, "HAS_RESIDUAL": False}
    tiles |= {"p_taps": empty(9, hidden).float(), "p_bias2": bias2, "p_weight": empty(channels, hidden)}
    tiles |= {"p_bias3": bias3, "p_residual": None, "p_out": known["p_x"]}
    grid = cdiv(batch * side // 2 * side, 64) + cdiv(batch, 128), 1
    contract = launch(leff_contract_kernel, grid, 1, **tiles)
    # 12 loads of a place serve two outputs, and each row of places is read by two program instances.
    steps = Kernel(patches(8 if columns == 16 else 16, 6), lambda a: [hidden // columns])
    return [(expand, Kernel(by_unit(l2, shared_by(hidden // 128)))), (contract, steps)]
