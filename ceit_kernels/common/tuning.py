"""Tile sizes: from the table, or, where that was asked for, the fastest of several on this GPU.

Tuning is an opt-in, by ``with autotune():`` or ``CEIT_KERNELS_AUTOTUNE=1``. The first call of a kernel for a class of
shapes then times its candidates on buffers of their own and writes the winner to a file, ``CEIT_KERNELS_TUNING_CACHE``
or ``~/.cache/ceit_kernels/tuning.json``, where every later process finds it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kept import Kept, key_of
from .launch import is_recording
from .stopwatch import gpu_seconds, has_clock, is_capturing

__all__ = ["Tiles", "autotune", "is_tuning", "tuned_tiles"]


class Tiles(NamedTuple):
    """A kernel's tile sizes by name, and how it is compiled."""

    sizes: dict[str, int]
    num_warps: int
    num_stages: int = 1


def _asked_by_environment() -> bool:
    return os.environ.get("CEIT_KERNELS_AUTOTUNE", "0") == "1"


# Looking it up in the environment takes as long as a launch.
_asked = _asked_by_environment()


def is_tuning() -> bool:
    """Whether tuning was asked for, by ``autotune`` or else by the environment of the process at its start."""
    return _asked


@contextmanager
def autotune(enabled: bool = True) -> Iterator[None]:
    """Time candidates for shapes that are new to this GPU inside the block, or with ``False`` take the table's.

    The setting holds for the whole process.
    """
    global _asked
    outer, _asked = _asked, enabled
    try:
        yield
    finally:
        _asked = outer


def tuned_tiles(
    kernel: str, table: Tiles, shape: Mapping[str, Any], x: Tensor, dtype: torch.dtype, run: Callable[[Tiles], Any]
) -> Tiles:
    """The tiles that a launch should use.

    Args:
        kernel: its name.
        table: what the table says, which is the answer unless tuning was asked for.
        shape: what the choice depends on; integers called "tokens" count up to the next power of two, so that batches
            of about one size are tuned once.
        x: a tensor of the call, on the GPU that is meant.
        dtype: what matmuls take.
        run: launches the kernel with the given tiles, into buffers that nothing else reads. It is called only to be
            timed: never while a CUDA graph is captured or launches are recorded.
    """
    if not is_tuning() or is_recording() or not has_clock(x):
        return table
    sizes = {name: 1 << (value - 1).bit_length() if name == "tokens" else value for name, value in shape.items()}
    named = ",".join(f"{name}={value}" for name, value in sizes.items())
    key = key_of(f"{kernel}|{named}", dtype, x.device)
    found = _kept.find(key)
    if found is not None and found.sizes.keys() == table.sizes.keys():
        return found
    if is_capturing():
        return table
    times: dict[int, float] = {}
    for i, tiles in enumerate(_candidates(table)):
        try:
            times[i] = gpu_seconds(lambda tiles=tiles: run(tiles))
        except Exception:  # whatever is wrong with a candidate, another is taken
            continue
    best = _candidates(table)[min(times, key=times.__getitem__)] if times else table
    _kept.keep(key, best)
    return best


def _candidates(table: Tiles) -> list[Tiles]:
    """The table's tiles first, then its neighbours: fewer or more rows, warps, and stages of the pipeline."""
    rows = next(iter(table.sizes))
    found = [table]
    for scale in (2, 1, 0.5):
        size = max(4 if rows == "TILE_P" else 16, int(table.sizes[rows] * scale))
        for warps in (4, 8):
            for stages in (1, 2, 3, 4):
                tiles = Tiles({**table.sizes, rows: size}, warps, stages)
                if tiles not in found:
                    found.append(tiles)
    return found


def _parse(entry: Mapping[str, Any]) -> Tiles:
    numbers = [*entry["sizes"].values(), entry["num_warps"], entry["num_stages"]]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"expected positive integers, got {entry}")
    return Tiles(dict(entry["sizes"]), entry["num_warps"], entry["num_stages"])


_kept = Kept("", "tuned tile sizes", _parse, Tiles._asdict)
