"""Host side of the Triton kernels: tiles, grids, buffers."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ...common.launch import cdiv, launch
from ...common.plan import buffer, planned
from . import MAX_TENSORS
from .kernels import column_sums_kernel, join_tokens_kernel

__all__ = ["column_sums_triton", "join_tokens_triton"]

_TILE = 2048  # elements that a program instance of 4 warps holds: 16 a thread, in float64 8
_MANY = 2**14  # columns of which tiles of 128 make enough program instances for the SMs of an H100


def _accumulator(*dtypes: torch.dtype) -> tuple[Any, int]:
    """What sums are taken in, and the elements of a tile."""
    return (tl.float64, _TILE // 2) if torch.float64 in dtypes else (tl.float32, _TILE)


@planned(tensors=2 + MAX_TENSORS)
def join_tokens_triton(positions: Tensor, added: Tensor | None, *others: Any) -> Tensor:
    """One launch; see ``ceit::join_tokens``.

    Args:
        positions: (1, N, C).
        added: to the last of the tensors, or None.
        others: the tensors, not empty, filled up with None, then whether all images share those ahead of the last, and
            the result's dtype.
    """
    *tokens, shared, dtype = [other for other in others if other is not None]
    (batch, _, channels), count = tokens[-1].shape, positions.shape[1]
    out = buffer((batch, count, channels), dtype, positions.device)
    (acc, tile), padded = _accumulator(dtype), next_power_of_2(channels)
    known: dict[str, Any] = {f"p_{i}": tensor for i, tensor in enumerate(tokens)}
    known |= {"p_added": added, "p_positions": positions, "p_out": out, "M": batch * count, "N": count}
    known |= {"STRIDE": 0 if shared else channels, "COUNT": len(tokens), "C": channels}
    known |= {"TILE_R": max(1, tile // padded), "TILE_C": padded, "ACC": acc}
    launch(join_tokens_kernel, (cdiv(batch * count, known["TILE_R"]),), known, 4 if padded <= _TILE else 8)
    return out


@planned(tensors=4)
def column_sums_triton(
    rows: Tensor, rows1: Tensor | None, rows2: Tensor | None, rows3: Tensor | None, *dtypes: torch.dtype | None
) -> tuple[Tensor | None, ...]:
    """One launch; see ``ceit::column_sums``, the arguments not empty."""
    matrices, (batch, first) = (rows, rows1, rows2, rows3), (rows.shape[0], rows[0].numel() // rows.shape[1])
    columns = [0 if matrix is None else matrix[0].numel() for matrix in matrices]
    shapes = [*((size,) for size in columns), (first,), (batch, rows.shape[1] - 1, *rows.shape[2:])]
    results = [
        None if dtype is None else buffer(shape, dtype, rows.device)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    acc, tile = _accumulator(*(matrix.dtype for matrix in matrices if matrix is not None))
    width = 128 if sum(columns) >= _MANY else 32
    known: dict[str, Any] = {"p_first": results[4], "p_rest": results[5], "B": batch, "FIRST": first}
    for i, matrix in enumerate(matrices):
        known |= {f"p_rows{i}": matrix, f"p_sum{i}": results[i], f"COLUMNS{i}": columns[i]}
    known |= {"TILE_B": tile // width, "TILE_C": width, "ACC": acc}
    launch(column_sums_kernel, (cdiv(max(columns), width), 1 + max(i for i in range(4) if columns[i])), known, 4)
    return tuple(results)
