"""Which of several implementations serves a kind of call on this GPU: measured once, and kept.

The first call of a kind times each of them, for some tenths of a second; the fastest of those that agree with plain
PyTorch wins. The finding goes to a file beside that of tuned tiles (``kept``), where every later process finds it.
``CEIT_KERNELS_MEASURE=0`` turns this off, and so does ``torch.use_deterministic_algorithms(True)``, as two measurements
may end differently: every call then goes by a rule.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calls import is_eager
from .kept import Kept, key_of
from .launch import is_recording
from .stopwatch import gpu_seconds, has_clock, is_capturing

__all__ = ["Finding", "describe_findings", "fastest"]

# Makes the results of a call, to be compared, anew at every call.
Run = Callable[[], Sequence[Tensor]]


# By bytes of what is computed in: far above rounding, far below what a wrong place or sign makes.
_TOLERANCES = {2: 0.05, 4: 5e-3, 8: 1e-6}


class Finding(NamedTuple):
    """What was measured of a kind of call.

    Attributes:
        winner: the implementation to take.
        seconds: of each implementation, None for one that failed or gave wrong results.
    """

    winner: str
    seconds: dict[str, float | None]


def fastest(
    call: str, x: Tensor, dtype: torch.dtype, plain: str, runs: Callable[[], Mapping[str, Run]], rule: str
) -> str:
    """The implementation that serves a kind of call: what was measured, now if need be, or what the rule says.

    Args:
        call: the kind, without dtype and GPU.
        x: a tensor of the call, on the GPU that is meant.
        dtype: what it computes in.
        plain: plain PyTorch among the implementations, which gives the right results.
        runs: makes, by name, what runs the call without a lasting effect. Asked for only to measure: never while a CUDA
            graph is captured, launches are recorded or a compiler traces.
        rule: the implementation for a kind of which nothing is known and that cannot be measured here and now.
    """
    if os.environ.get("CEIT_KERNELS_MEASURE") == "0" or torch.are_deterministic_algorithms_enabled():
        return rule
    if is_recording() or not (is_eager(x) and has_clock(x)):
        return rule
    key = key_of(call, dtype, x.device)
    finding = _kept.find(key)
    if finding is None and not is_capturing():
        with torch.cuda.device_of(x), _undisturbed():
            finding = _measure(plain, runs(), _TOLERANCES[dtype.itemsize])
        if finding is not None:
            _kept.keep(key, finding)
    return rule if finding is None else finding.winner


def describe_findings() -> list[str]:
    """A line for each kind of call that was measured on any GPU."""
    lines = []
    for key, finding in sorted(_kept.everything().items()):
        call, dtype, chip, *_ = key.rsplit("|", 5)
        times = (f"{name} {_in_words(seconds)}" for name, seconds in finding.seconds.items())
        lines.append(f"{call} in {dtype} on {chip}: {finding.winner} ({', '.join(times)})")
    return lines


def _in_words(seconds: float | None) -> str:
    return "failed" if seconds is None else f"{1e6 * seconds:,.0f} us"


@contextmanager
def _undisturbed():
    """A block after which autocast's cache holds nothing that a graph's memory pool owns."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _measure(plain: str, runs: Mapping[str, Run], tolerance: float) -> Finding | None:
    """None if not even plain PyTorch can be timed, as where memory is short: then a later call is measured."""
    seconds: dict[str, float | None] = dict.fromkeys(runs)
    try:
        expected = runs[plain]()
        seconds[plain] = gpu_seconds(runs[plain])
    except Exception:
        return None
    for name, run in runs.items():
        if name == plain:
            continue
        try:
            if _agree(run(), expected, tolerance):
                seconds[name] = gpu_seconds(run)
        except Exception:  # whatever is wrong with it, another is taken
            continue
    timed = {name: time for name, time in seconds.items() if time is not None}
    return Finding(min(timed, key=timed.__getitem__), seconds)


def _agree(results: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    """Whether results have the right dtypes, shapes and, but for rounding, values."""
    for ours, right in zip(results, expected, strict=True):
        if ours.shape != right.shape or ours.dtype != right.dtype:
            return False
        wide = torch.promote_types(right.dtype, torch.float32)
        if not (ours.to(wide) - right.to(wide)).norm() <= tolerance * right.to(wide).norm():
            return False
    return True


def _parse(entry: Mapping[str, Any]) -> Finding:
    seconds = {str(name): None if time is None else float(time) for name, time in entry["seconds"].items()}
    if seconds.get(entry["winner"]) is None:
        raise ValueError(f"expected a winner that was timed, got {entry}")
    return Finding(entry["winner"], seconds)


_kept = Kept(".choices.json", "measured times", _parse, Finding._asdict)
