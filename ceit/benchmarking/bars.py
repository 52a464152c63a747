"""The bars: by how much the fused operators have to beat the best that is free, and whether they do here.

Who prepares a model once is held against a frozen model, who follows every change of its weights against a live one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .groups import Group, has_bfloat16
from .measure import Entry, GroupResult
from .statistics import Ratio, median_ratio

__all__ = ["Bar", "BarResult", "bar_rows", "bars", "judge"]


@dataclass(frozen=True)
class Bar:
    """What the fused operators have to reach in a group.

    Attributes:
        group: what is computed.
        ours: "fused" or "frozen".
        rivals: contenders, the fastest of which counts.
        speedup: the least that its time / our time may be.
        memory: the most that our peak memory / plain PyTorch's may be; None for no bar.
    """

    group: Group
    ours: str
    rivals: tuple[str, ...]
    speedup: float
    memory: float | None = None

    @property
    def contenders(self) -> tuple[str, ...]:
        """Who has to be timed."""
        return tuple(dict.fromkeys(("plain", *self.rivals, self.ours)))


@dataclass(frozen=True)
class BarResult:
    """Whether a bar is reached.

    Attributes:
        bar: which.
        rival: the fastest one that was timed; empty if there is no result.
        ratio: its time / our time.
        memory: our peak memory / plain PyTorch's, where there is a bar for it.
        verdict: "reached", "missed", or "open" where the interval of the ratio holds the bar or a rival is lacking.
        reason: why it is open or without a result.
    """

    bar: Bar
    rival: str
    ratio: Ratio | None
    memory: float | None
    verdict: str
    reason: str


_LIVE = ("plain", "compile")
_FREEZING = ("compile-freezing",)
_PREPARED = (*_FREEZING, "openvino", "onnxruntime")


def bars(device: torch.device) -> list[Bar]:
    """The bars for a device; none for a GPU."""
    if device.type != "cpu":
        return []
    found = []
    for size in ("tiny", "small"):
        found += [
            Bar(Group("leff", size, "inference", "float32", 16), "frozen", _FREEZING, 1.15),
            Bar(Group("leff", size, "training", "float32", 16), "fused", ("plain",), 1.6),
        ]
    for size in ("tiny", "small"):
        for group in (Group("model", size, "inference", "float32", n) for n in (1, 16)):
            found += [Bar(group, "frozen", _PREPARED, 1.0), Bar(group, "fused", _LIVE, 1.0)]
        found.append(Bar(Group("model", size, "training", "float32", 8), "fused", _LIVE, 1.6, memory=0.6))
    if has_bfloat16(device):
        groups = [Group("model", size, "inference", "bfloat16", n) for size in ("tiny", "small") for n in (1, 16)]
        found += [Bar(group, "frozen", _FREEZING, 1.3) for group in groups]
    return found


def judge(bar: Bar, result: GroupResult) -> BarResult:
    """Hold a group's result to its bar.

    A bar is reached only where the whole interval of the ratio is, and missed only where none of it is.
    """
    entries = {entry.contender: entry for entry in result.entries}
    ours, plain = entries[bar.ours], entries["plain"]
    rivals = [entries[name] for name in bar.rivals]
    timed = [entry for entry in rivals if entry.median is not None]
    if ours.median is None or not timed:
        lacking = [entry for entry in (ours, *rivals) if entry.median is None]
        return BarResult(bar, "", None, None, "missed" if ours.median is None else "open", _reasons(lacking))
    rival = min(timed, key=lambda entry: entry.median)
    ratio = median_ratio(rival.seconds, ours.seconds)
    memory = None if bar.memory is None else ours.peak_bytes / plain.peak_bytes
    if ratio.high < bar.speedup or (memory is not None and memory > bar.memory):
        return BarResult(bar, rival.contender, ratio, memory, "missed", "")
    lacking = [entry for entry in rivals if entry.median is None]
    if lacking or ratio.low < bar.speedup:
        return BarResult(bar, rival.contender, ratio, memory, "open", _reasons(lacking) or "the interval holds the bar")
    return BarResult(bar, rival.contender, ratio, memory, "reached", "")


def bar_rows(results: Sequence[BarResult]) -> list[list[str]]:
    """The results as rows of a table, with the head."""
    rows = [["group", "ours", "fastest of the others", "bar", "its time / ours", "99% interval", "memory", "verdict"]]
    for result in results:
        bar, ratio = result.bar, result.ratio
        memory = "-" if result.memory is None else f"{result.memory:.2f} (at most {bar.memory:.2f})"
        rows.append(
            [
                bar.group.name,
                bar.ours,
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
