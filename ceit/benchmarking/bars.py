"""The bars: by how much the fused operators have to beat the best that is free, and whether they do here."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .groups import Group, has_bfloat16
from .measure import Entry, GroupResult
from .statistics import Ratio, median_ratio

__all__ = ["Bar", "BarResult", "bar_rows", "bars", "judge"]


@dataclass(frozen=True)
class Bar:
    """What fused has to reach in a group.

    Attributes:
        group: what is computed.
        rivals: contenders, the fastest of which counts.
        speedup: the least that its time / fused time may be.
        memory: the most that fused peak memory / plain PyTorch's may be; None for no bar.
    """

    group: Group
    rivals: tuple[str, ...]
    speedup: float
    memory: float | None = None

    @property
    def contenders(self) -> tuple[str, ...]:
        """Who has to be timed."""
        return tuple(dict.fromkeys(("plain", *self.rivals, "fused")))


@dataclass(frozen=True)
class BarResult:
    """Whether a bar is reached.

    Attributes:
        bar: which.
        rival: the fastest one that was timed; empty if there is no result.
        ratio: its time / fused time.
        memory: fused peak memory / plain PyTorch's, where there is a bar for it.
        verdict: "reached", "missed", or "open" where the interval of the ratio holds the bar or a rival is lacking.
        reason: why it is open or without a result.
    """

    bar: Bar
    rival: str
    ratio: Ratio | None
    memory: float | None
    verdict: str
    reason: str


_COMPILED = ("plain", "compile", "compile-freezing")
_RUNTIMES = ("openvino", "onnxruntime")


def bars(device: torch.device) -> list[Bar]:
    """The bars for a device; none for a GPU."""
    if device.type != "cpu":
        return []
    found = []
    for size in ("tiny", "small"):
        found += [
            Bar(Group("leff", size, "inference", "float32", 16), ("compile-freezing",), 1.15),
            Bar(Group("leff", size, "training", "float32", 16), ("plain",), 1.6),
        ]
    for size in ("tiny", "small"):
        found += [Bar(Group("model", size, "inference", "float32", n), _COMPILED + _RUNTIMES, 1.0) for n in (1, 16)]
        found.append(Bar(Group("model", size, "training", "float32", 8), ("plain", "compile"), 1.6, memory=0.6))
    if has_bfloat16(device):
        groups = [Group("model", size, "inference", "bfloat16", n) for size in ("tiny", "small") for n in (1, 16)]
        found += [Bar(group, ("compile-freezing",), 1.3) for group in groups]
    return found


def judge(bar: Bar, result: GroupResult) -> BarResult:
    """Hold a group's result to its bar.

    A bar is reached only where the whole interval of the ratio is, and missed only where none of it is.
    """
    entries = {entry.contender: entry for entry in result.entries}
    fused, plain = entries["fused"], entries["plain"]
    rivals = [entries[name] for name in bar.rivals]
    timed = [entry for entry in rivals if entry.median is not None]
    if fused.median is None or not timed:
        lacking = [entry for entry in (fused, *rivals) if entry.median is None]
        return BarResult(bar, "", None, None, "missed" if fused.median is None else "open", _reasons(lacking))
    rival = min(timed, key=lambda entry: entry.median)
    ratio = median_ratio(rival.seconds, fused.seconds)
    memory = None if bar.memory is None else fused.peak_bytes / plain.peak_bytes
    if ratio.high < bar.speedup or (memory is not None and memory > bar.memory):
        return BarResult(bar, rival.contender, ratio, memory, "missed", "")
    lacking = [entry for entry in rivals if entry.median is None]
    if lacking or ratio.low < bar.speedup:
        return BarResult(bar, rival.contender, ratio, memory, "open", _reasons(lacking) or "the interval holds the bar")
    return BarResult(bar, rival.contender, ratio, memory, "reached", "")


def bar_rows(results: Sequence[BarResult]) -> list[list[str]]:
    """The results as rows of a table, with the head."""
    rows = [["group", "fastest of the others", "bar", "its time / fused", "99% interval", "memory", "verdict"]]
    for result in results:
        bar, ratio = result.bar, result.ratio
        memory = "-" if result.memory is None else f"{result.memory:.2f} (at most {bar.memory:.2f})"
        rows.append(
            [
                bar.group.name,
                result.rival or "-",
                f"{bar.speedup:.2f}",
                "-" if ratio is None else f"{ratio.value:.2f}",
                "-" if ratio is None else f"{ratio.low:.2f} to {ratio.high:.2f}",
                memory,
                f"{result.verdict}: {result.reason}" if result.reason else result.verdict,
            ]
        )
    return rows


def _reasons(entries: Sequence[Entry]) -> str:
    return "; ".join(f"{entry.contender} {entry.status}: {entry.reason}" for entry in entries)
