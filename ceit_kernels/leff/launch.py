"""Host side of LeFF's Triton kernels: blocks, grids, buffers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from ..common.launch import launch, target_chip
from ..common.precision import precision_arguments
from .folding import FoldedWeights
from .kernels.inference import leff_contract_kernel, leff_expand_kernel

__all__ = ["leff_inference_triton"]


class _Contract(NamedTuple):
    """Blocks of the second kernel: patches of two by two, hidden channels, output channels, and how many of these."""

    BX: int
    BE: int
    BO: int
    NO: int


def _contract_blocks(out_features: int, dtype: torch.dtype, chip: int, has_residual: bool) -> _Contract:
    if dtype.itemsize > 2:
        return _Contract(8, 16, min(64, max(16, next_power_of_2(out_features))), 1)
    # Of the ways to cover the output channels by blocks of which one program holds several, so that it computes the
    # hidden image once for all, the one that pads least, with as few blocks as possible.
    ways = [(block, count) for block in (64, 128) for count in (1, 2, 3)]
    block, count = min(ways, key=lambda way: (cdiv(out_features, way[0] * way[1]), way[0] * way[1], way[1]))
    # Products of these two chips take an operand from shared memory, which leaves registers for larger blocks; a
    # residual needs them in turn. More than 64 outputs of 384 channels would take all registers, and the loads of a
    # step would wait for one another.
    roomy = chip in (90, 100) and not has_residual and block * count <= 192
    return _Contract(32 if roomy else 16, 32, block, count)


def leff_inference_triton(
    x: Tensor,
    folded: FoldedWeights,
    residual: Tensor | None,
    grid_size: tuple[int, int],
    num_prefix_tokens: int,
    activations: tuple[str, str],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """Two launches. x and residual contiguous, B at least 1; ``dtype`` is what products take."""
    batch, tokens, in_features = x.shape
    height, width = grid_size
    hidden_features, out_features = folded.bias1.shape[0], folded.bias3.shape[0]
    image_tokens = batch * height * width
    precision = {**precision_arguments(dtype), "EXACT": dtype.itemsize > 2}
    wide = dtype.itemsize > 2

    hidden = torch.empty(image_tokens, hidden_features, dtype=dtype, device=x.device)
    block = 64 if wide else 128
    blocks = {
        "BM": block,
        "BE": min(block, max(16, next_power_of_2(hidden_features))),
        "BC": min(block // 2, max(16, next_power_of_2(in_features))),
    }
    launch(
        leff_expand_kernel,
        (cdiv(image_tokens, blocks["BM"]) * cdiv(hidden_features, blocks["BE"]),),
        {
            "p_x": x,
            "p_weight": folded.weight1,
            "p_bias": folded.bias1,
            "p_h": hidden,
            "M": image_tokens,
            "HW": height * width,
            "P": num_prefix_tokens,
            "C": in_features,
            "E": hidden_features,
            "ACTIVATION": activations[0],
            **blocks,
            **precision,
        },
        num_warps=8,
        num_stages=2 if wide else 3,
    )

    out = torch.empty(batch, tokens, out_features, dtype=out_dtype, device=x.device)
    blocks = _contract_blocks(out_features, dtype, target_chip(x), residual is not None)
    patches = batch * cdiv(height, 2) * cdiv(width, 2)
    prefix_blocks = cdiv(batch * num_prefix_tokens, 4 * blocks.BX)
    launch(
        leff_contract_kernel,
        ((cdiv(patches, blocks.BX) + prefix_blocks) * cdiv(out_features, blocks.BO * blocks.NO),),
        {
            "p_h": hidden,
            "p_taps": folded.taps,
            "p_bias2": folded.bias2,
            "p_weight": folded.weight3,
            "p_bias3": folded.bias3,
            "p_x": x,
            "p_residual": residual,
            "p_out": out,
            "B": batch,
            "H": height,
            "W": width,
            "P": num_prefix_tokens,
            "E": hidden_features,
            "O": out_features,
            "KERNEL": round(folded.taps.shape[0] ** 0.5),
            "ACTIVATION": activations[1],
            "HAS_RESIDUAL": residual is not None,
            **blocks._asdict(),
            **precision,
        },
        num_warps=8,
        num_stages=1,
    )
    return out
