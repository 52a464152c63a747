"""Blocks of LeFF's kernels by shape, dtype and chip."""

from __future__ import annotations

import torch
from triton import cdiv, next_power_of_2

from ..common.tuning import Blocks

__all__ = [
    "PARTS",
    "Blocks",
    "contract_blocks",
    "depthwise_blocks",
    "expand_blocks",
    "factored_weight_blocks",
    "fold_gradient_blocks",
    "hidden_gradient_blocks",
    "inference_contract_blocks",
    "inference_expand_blocks",
    "row_blocks",
    "sum_blocks",
    "weight_gradient_blocks",
]


# Tensor cores of these chips read operands from shared memory, which leaves registers for larger blocks.
_OPERANDS_FROM_SHARED_MEMORY = (90, 100)

# Of the kernels that merge what program instances left behind.
PARTS = Blocks({"BT": 64, "BE": 16}, num_warps=4)


def _fit(size: int, channels: int) -> int:
    """A block no larger than the channels need, and no smaller than a tensor core's smallest side."""
    return min(size, max(16, next_power_of_2(channels)))


def _cover(channels: int) -> tuple[int, int]:
    """The block, and how many of it, that cover channels with the least waste, up to 384 of them."""
    ways = [(size, count) for size in (64, 128) for count in (1, 2, 3)]
    return min(ways, key=lambda way: (cdiv(channels, way[0] * way[1]), way[0] * way[1], way[1]))


def inference_expand_blocks(in_features: int, hidden_features: int, dtype: torch.dtype) -> Blocks:
    """act(x W_1^T): tokens, hidden channels and the depth of the product."""
    size, stages = (64, 2) if dtype.itemsize > 2 else (128, 3)
    return Blocks({"BM": size, "BE": _fit(size, hidden_features), "BC": _fit(size // 2, in_features)}, 8, stages)


def inference_contract_blocks(out_features: int, dtype: torch.dtype, chip: int, has_residual: bool) -> Blocks:
    """Patches of two by two outputs, hidden channels, output channels, and how many blocks of these."""
    if dtype.itemsize > 2:
        return Blocks({"BX": 8, "BE": 16, "BO": _fit(64, out_features), "NO": 1}, 8)
    size, count = _cover(out_features)
    # A residual needs registers. More than 64 outputs of 384 channels would take all of them, and the loads of a step
    # would wait for one another.
    roomy = chip in _OPERANDS_FROM_SHARED_MEMORY and not has_residual and size * count <= 192
    return Blocks({"BX": 32 if roomy else 16, "BE": 32, "BO": size, "NO": count}, 8)


def expand_blocks(in_features: int, hidden_features: int, dtype: torch.dtype, chip: int) -> Blocks:
    """x W_1^T: tokens, hidden channels and the depth of the product."""
    if dtype.itemsize > 2:
        return Blocks({"BM": 64, "BE": _fit(64, hidden_features), "BC": _fit(32, in_features)}, 8, 2)
    # On cc 90 four warps hold the block, so that two program instances share an SM and hide each other's waits.
    depth, warps = (64, 4) if chip == 90 else (32, 8)
    return Blocks({"BM": 128, "BE": _fit(128, hidden_features), "BC": _fit(depth, in_features)}, warps, 3)


def hidden_gradient_blocks(out_features: int, hidden_features: int, dtype: torch.dtype, chip: int) -> Blocks:
    """dz3 W_3, likewise; the activation's slope takes registers of its own."""
    if dtype.itemsize > 2:
        return Blocks({"BM": 64, "BE": _fit(64, hidden_features), "BO": _fit(32, out_features)}, 8, 2)
    depth, warps = (32, 8) if chip == 120 else (64, 4)
    return Blocks({"BM": 64, "BE": _fit(128, hidden_features), "BO": _fit(depth, out_features)}, warps, 3)


def contract_blocks(out_features: int, dtype: torch.dtype, chip: int) -> Blocks:
    """Operand times W^T: tokens, depth, and blocks of output channels, all of them where the registers hold them."""
    if dtype.itemsize > 2:
        return Blocks({"BM": 64, "BE": 16, "BO": _fit(64, out_features), "NO": 1}, 8, 2)
    size, count = _cover(out_features)
    tokens = 128 if chip in _OPERANDS_FROM_SHARED_MEMORY and out_features <= 384 else 64
    return Blocks({"BM": tokens, "BE": 32, "BO": _fit(size, out_features), "NO": count}, 8, 2)


def weight_gradient_blocks(channels: int, width: int, dtype: torch.dtype, chip: int) -> Blocks:
    """operand^T tokens: tokens at a time, the operand's channels, and blocks of the tokens' channels."""
    if dtype.itemsize > 2:
        return Blocks({"BM": 16, "BE": _fit(64, width), "BC": _fit(64, channels), "NC": 1}, 8, 2)
    size, count = _cover(channels)
    columns = 128 if chip in _OPERANDS_FROM_SHARED_MEMORY else 64
    depth = 16 if chip == 120 and size == 128 else 32
    return Blocks({"BM": depth, "BE": _fit(columns, width), "BC": _fit(size, channels), "NC": count}, 8, 3)


def fold_gradient_blocks(channels: int) -> Blocks:
    """The product of weights of the factored gradients, which every program instance reads along one side."""
    wide = channels % 128 == 0
    return Blocks({"BE": 32, "BC": _fit(128 if wide else 64, channels)}, 8 if wide else 4, 2)


def factored_weight_blocks(channels: int) -> Blocks:
    """The small product of the factored gradient of the first weight."""
    return Blocks({"BE": 32, "BC": _fit(64, channels), "BK": 32}, 4, 2)


def depthwise_blocks(width: int, hidden_features: int, kernel_size: int, dtype: torch.dtype) -> Blocks:
    """Columns of a program instance, and hidden channels: two a thread, or one where their registers would not do."""
    most = {3: 14, 5: 7, 7: 4}[kernel_size]
    tiles = cdiv(width, most)
    return Blocks({"BW": cdiv(width, tiles), "BE": 64 if dtype.itemsize <= 2 and kernel_size == 3 else 32}, 1)


def row_blocks(channels: int) -> Blocks:
    """Kernels that take tokens as they come."""
    return Blocks({"BM": 16, "BO": _fit(128, channels)}, 4)


def sum_blocks(parts: int) -> Blocks:
    """Sums of partial results."""
    return Blocks({"BS": min(32, next_power_of_2(parts)), "BN": 64 if parts > 32 else 256}, 4)
