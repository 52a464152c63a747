"""Tile sizes: from the table, or, where that was asked for, the fastest of several on this GPU.

Tuning is an opt-in, by ``with autotune():`` or ``CEIT_KERNELS_AUTOTUNE=1``. The first call of a kernel for a class of
shapes then times its candidates on buffers of their own and writes the winner to a file, ``CEIT_KERNELS_TUNING_CACHE``
or ``~/.cache/ceit_kernels/tuning.json``, where every later process finds it.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import is_recording

__all__ = ["Tiles", "autotune", "cache_path", "is_capturing", "is_tuning", "tuned_tiles"]


class Tiles(NamedTuple):
    """A kernel's tile sizes by name, and how it is compiled."""

    sizes: dict[str, int]
    num_warps: int
    num_stages: int = 1


_REPETITIONS = 7
_asked: bool | None = None
# What was read or found in this process, by file and key.
_known: dict[tuple[Path, str], Tiles] = {}
_read: set[Path] = set()


def is_tuning() -> bool:
    """Whether tuning was asked for, by ``autotune`` or else by the environment."""
    return os.environ.get("CEIT_KERNELS_AUTOTUNE", "0") == "1" if _asked is None else _asked


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


def cache_path() -> Path:
    """The file that winners are kept in."""
    default = Path.home() / ".cache" / "ceit_kernels" / "tuning.json"
    return Path(os.environ.get("CEIT_KERNELS_TUNING_CACHE", default))


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
    if not is_tuning() or is_recording() or not _has_clock(x):
        return table
    path, key = cache_path(), _key(kernel, shape, x, dtype)
    if path not in _read:
        _read.add(path)
        for known, tiles in _load(path).items():
            _known.setdefault((path, known), tiles)
    found = _known.get((path, key))
    if found is not None and found.sizes.keys() == table.sizes.keys():
        return found
    if is_capturing():
        return table
    times = {}
    for i, tiles in enumerate(_candidates(table)):
        try:
            times[i] = _seconds(lambda tiles=tiles: run(tiles))
        except _does_not_fit():
            continue
    best = _candidates(table)[min(times, key=times.get)] if times else table
    _known[path, key] = best
    _store(path, key, best)
    return best


def _candidates(table: Tiles) -> list[Tiles]:
    """The table's tiles first, then its neighbours: fewer or more rows, warps, and stages of the pipeline."""
    rows = next(iter(table.sizes))
    found = [table]
    for scale in (2, 1, 0.5):
        size = max(4 if rows == "TILE_P" else 16, int(table.sizes[rows] * scale))
        for warps in (4, 8):
            for stages in {table.num_stages, *((2, 3, 4) if table.num_stages > 1 else ())}:
                tiles = Tiles({**table.sizes, rows: size}, warps, stages)
                if tiles not in found:
                    found.append(tiles)
    return found


def _has_clock(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_available()


def is_capturing() -> bool:
    """Whether launches on the current stream become part of a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _seconds(run: Callable[[], Any]) -> float:
    """The median time of a launch, the first two left out, which compile and warm up."""
    times = []
    for _ in range(_REPETITIONS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times[2:])


def _does_not_fit() -> tuple[type[Exception], ...]:
    """The errors by which a candidate says that this GPU is too small for it."""
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, torch.OutOfMemoryError


def _key(kernel: str, shape: Mapping[str, Any], x: Tensor, dtype: torch.dtype) -> str:
    sizes = {name: 1 << (value - 1).bit_length() if name == "tokens" else value for name, value in shape.items()}
    named = ",".join(f"{name}={value}" for name, value in sizes.items())
    return "|".join((kernel, named, str(dtype).removeprefix("torch."), _chip(x.device), *_versions()))


def _chip(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@cache
def _versions() -> tuple[str, ...]:
    def installed(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"{package} ?"

    return tuple(installed(package) for package in ("ceit-kernels", "torch", "triton"))


def _load(path: Path) -> dict[str, Tiles]:
    """The winners in a file. One that cannot be read is named in a warning, and counts as empty."""
    try:
        entries = json.loads(path.read_text())
        return {key: _tiles(entry) for key, entry in entries.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{path}: expected tuned tile sizes, which are found again: {error!r}", stacklevel=2)
        return {}


def _tiles(entry: Mapping[str, Any]) -> Tiles:
    numbers = [*entry["sizes"].values(), entry["num_warps"], entry["num_stages"]]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"expected positive integers, got {entry}")
    return Tiles(dict(entry["sizes"]), entry["num_warps"], entry["num_stages"])


def _store(path: Path, key: str, tiles: Tiles) -> None:
    """Add a winner to those that other processes may have written meanwhile; the file is replaced as a whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a file that was named when it was read
        entries = {**_load(path), key: tiles}
    text = json.dumps({key: tiles._asdict() for key, tiles in sorted(entries.items())}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"{path}: tuned tile sizes hold for this process alone: {error}", stacklevel=2)
