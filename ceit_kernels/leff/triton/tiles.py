"""Tiles of LeFF's kernels by shape, dtype and chip."""

from __future__ import annotations

import torch
import triton

from ...common.launch import cdiv
from ...common.tuning import Tiles

__all__ = [
    "PARTS",
    "contract_tiles",
    "depthwise_tiles",
    "expand_tiles",
    "factored_tiles",
    "hidden_gradient_tiles",
    "inference_contract_tiles",
    "inference_expand_tiles",
    "moments_tiles",
    "row_tiles",
    "stream_tiles",
    "weight_gradient_tiles",
]


_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

# Tensor cores of these chips read operands from shared memory, which leaves registers for larger tiles.
_OPERANDS_FROM_SHARED_MEMORY = (90, 100)

# Of the kernels that merge what program instances left behind.
PARTS = Tiles({"TILE_T": 64, "TILE_E": 16, "TILE_S": 16, "TILE_N": 128}, num_warps=4)


def _fit(size: int, channels: int) -> int:
    """A tile no larger than the channels need, and no smaller than a tensor core's smallest side."""
    return min(size, max(16, 1 << (channels - 1).bit_length()))


def _cover(channels: int) -> tuple[int, int]:
    """The tile, and how many of it, that cover channels with the least waste, up to 384 of them."""
    ways = [(size, count) for size in (64, 128) for count in (1, 2, 3)]
    return min(ways, key=lambda way: (cdiv(channels, way[0] * way[1]), way[0] * way[1], way[1]))


def inference_expand_tiles(in_features: int, hidden_features: int, dtype: torch.dtype) -> Tiles:
    """act(x W_1^T): tokens, hidden channels and the depth of the GEMM."""
    size, stages = (64, 2) if dtype.itemsize > 2 else (128, 3)
    return Tiles(
        {"TILE_M": size, "TILE_E": _fit(size, hidden_features), "TILE_C": _fit(size // 2, in_features)}, 8, stages
    )


def inference_contract_tiles(out_features: int, dtype: torch.dtype, chip: int, has_residual: bool) -> Tiles:
    """Patches of two by two outputs, hidden channels, output channels, and how many tiles of these."""
    if dtype.itemsize > 2:
        return Tiles({"TILE_P": 8, "TILE_E": 16, "TILE_O": _fit(64, out_features), "NUM_O": 1}, 8)
    size, count = _cover(out_features)
    # A residual needs registers. More than 64 outputs of 384 channels would take all of them, and the loads of a step
    # would wait for one another.
    roomy = chip in _OPERANDS_FROM_SHARED_MEMORY and not has_residual and size * count <= 192
    return Tiles({"TILE_P": 32 if roomy else 16, "TILE_E": 32, "TILE_O": size, "NUM_O": count}, 8)


def expand_tiles(in_features: int, hidden_features: int, dtype: torch.dtype, chip: int) -> Tiles:
    """x W_1^T: tokens, hidden channels and the depth of the GEMM, and how many partial results the last program
    instance takes at a time.
    """
    if dtype.itemsize > 2:
        sizes = {"TILE_M": 64, "TILE_E": _fit(64, hidden_features), "TILE_C": _fit(32, in_features), "TILE_T": 16}
        return Tiles(sizes, 8, 2)
    # On cc 90 four warps hold the tile, so that two program instances share an SM and hide each other's waits.
    # On cc 120 eight spill with a depth of 32 and 320 channels.
    depth, warps = {90: (64, 4), 120: (64, 8)}.get(chip, (32, 8))
    sizes = {"TILE_M": 128, "TILE_E": _fit(128, hidden_features), "TILE_C": _fit(depth, in_features), "TILE_T": 16}
    return Tiles(sizes, warps, 3)


def hidden_gradient_tiles(out_features: int, hidden_features: int, dtype: torch.dtype, chip: int) -> Tiles:
    """dz3 W_3, likewise; the activation's slope takes registers of its own, and four warps spill on some chips."""
    if dtype.itemsize > 2:
        return Tiles({"TILE_M": 64, "TILE_E": _fit(64, hidden_features), "TILE_O": _fit(32, out_features)}, 8, 2)
    depth, warps = (64, 4) if chip in (80, 100) else (32, 8)
    return Tiles({"TILE_M": 64, "TILE_E": _fit(128, hidden_features), "TILE_O": _fit(depth, out_features)}, warps, 3)


def contract_tiles(out_features: int, dtype: torch.dtype, chip: int) -> Tiles:
    """Operand times W^T: tokens, depth, and tiles of output channels, all of them where the registers hold them; and
    how many partial results the last program instance takes at a time.
    """
    if dtype.itemsize > 2:
        return Tiles({"TILE_M": 64, "TILE_E": 16, "TILE_O": _fit(64, out_features), "NUM_O": 1, "TILE_T": 16}, 8, 2)
    size, count = _cover(out_features)
    tokens = 128 if chip == 90 or (chip == 100 and out_features <= 384) else 64
    # One program instance fills an SM there: nothing but loads far ahead hides its waits.
    stages = 4 if chip in _OPERANDS_FROM_SHARED_MEMORY else 2
    if chip == 100 and _TRITON < (3, 8):  # 3.6 stops at an assertion where it pipelines these loops
        stages = 1
    sizes = {"TILE_M": tokens, "TILE_E": 32, "TILE_O": _fit(size, out_features), "NUM_O": count, "TILE_T": 16}
    return Tiles(sizes, 8, stages)


def weight_gradient_tiles(
    channels: int, width: int, dtype: torch.dtype, chip: int, only_moments: bool = False
) -> Tiles:
    """operand^T tokens: tokens at a time, the operand's channels, and tiles of the tokens' channels; ``only_moments``
    where x^T x is all that is wanted, of which a program instance has one tile.
    """
    if dtype.itemsize > 2:
        return Tiles({"TILE_M": 16, "TILE_E": _fit(64, width), "TILE_C": _fit(64, channels), "NUM_C": 1}, 8, 2)
    size, count = _cover(channels)
    columns = 128 if chip in _OPERANDS_FROM_SHARED_MEMORY else 64
    depth, stages = 16 if chip == 120 and size == 128 else 32, 3
    if only_moments and chip in _OPERANDS_FROM_SHARED_MEMORY:
        depth, stages = 64, 4
    sizes = {"TILE_M": depth, "TILE_E": _fit(columns, width), "TILE_C": _fit(size, channels), "NUM_C": count}
    return Tiles(sizes, 8, stages)


def factored_tiles(tiles: Tiles, channels: int) -> Tiles:
    """With those of W_1^T b W_1, for which every program instance reads the weight along one side, of W_1 cov x, and of
    the taps' sums.
    """
    fold = {"FOLD_E": 32, "FOLD_C": _fit(128 if channels % 128 == 0 else 64, channels)}
    others = {"WEIGHT_E": 32, "WEIGHT_C": _fit(64, channels), "TILE_S": 16, "TILE_N": 128}
    return tiles._replace(sizes={**tiles.sizes, **fold, **others})


def depthwise_tiles(width: int, hidden_features: int, kernel_size: int, dtype: torch.dtype) -> Tiles:
    """Columns of a program instance, and hidden channels: two a thread, or one where their registers would not do; and
    how many partial results the last one takes at a time.
    """
    most = {3: 14, 5: 7, 7: 4}[kernel_size]
    tiles = cdiv(width, most)
    channels = 64 if dtype.itemsize <= 2 and kernel_size == 3 else 32
    return Tiles({"TILE_W": cdiv(width, tiles), "TILE_E": channels, "TILE_T": 16}, 1)


def row_tiles(channels: int, tokens: int = 16) -> Tiles:
    """Kernels that take tokens as they come; TILE_T where they merge partial sums first."""
    return Tiles({"TILE_M": tokens, "TILE_O": _fit(128, channels), "TILE_T": 16}, 4)


def stream_tiles(channels: int) -> Tiles:
    """The pass for g2, which takes hidden channels as they come; with registers for four program instances an SM."""
    return Tiles({"TILE_M": 8, "TILE_E": _fit(128, channels)}, 4)


def moments_tiles(channels: int) -> Tiles:
    """The pass for the moments of z1, likewise; by four loads of 16 bytes a thread at a time."""
    return Tiles({"TILE_M": 16, "TILE_E": _fit(256, channels)}, 4)
