"""The targets: by how much the fused operators have to beat the best that is free, and whether they do here.

Who prepares a model once is held against a frozen model, who follows every change of its weights against a live one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .measure import Entry, Result
from .statistics import Ratio, median_ratio
from .workloads import Workload, has_bfloat16

__all__ = ["Target", "TargetResult", "judge", "target_rows", "targets"]


@dataclass(frozen=True)
class Target:
    """What the fused operators have to reach in a workload.

    Attributes:
        workload: what is computed.
        ours: "fused" or "frozen".
        rivals: implementations, the fastest of which counts.
        speedup: the least that its time / our time may be.
        memory: the most that our peak memory / plain PyTorch's may be; None for no target.
    """

    workload: Workload
    ours: str
    rivals: tuple[str, ...]
    speedup: float
    memory: float | None = None

    @property
    def implementations(self) -> tuple[str, ...]:
        """Who has to be timed."""
        return tuple(dict.fromkeys(("plain", *self.rivals, self.ours)))


@dataclass(frozen=True)
class TargetResult:
    """Whether a target is reached.

    Attributes:
        target: which.
        rival: the fastest one that was timed; empty if there is no result.
        ratio: its time / our time.
        memory: our peak memory / plain PyTorch's, where there is a target for it.
        verdict: "reached", "missed", or "open" where the interval of the ratio holds the target or a rival is lacking.
        reason: why it is open or without a result.
    """

    target: Target
    rival: str
    ratio: Ratio | None
    memory: float | None
    verdict: str
    reason: str


_LIVE = ("plain", "compile")
_FREEZING = ("compile-freezing",)
_PREPARED = (*_FREEZING, "openvino", "onnxruntime")


def targets(device: torch.device) -> list[Target]:
    """The targets for a device; none for a GPU."""
    if device.type != "cpu":
        return []
    found = []
    for size in ("tiny", "small"):
        found += [
            Target(Workload("leff", size, "inference", "float32", 16), "frozen", _FREEZING, 1.15),
            Target(Workload("leff", size, "training", "float32", 16), "fused", ("plain",), 1.6),
        ]
    for size in ("tiny", "small"):
        for workload in (Workload("model", size, "inference", "float32", n) for n in (1, 16)):
            found += [Target(workload, "frozen", _PREPARED, 1.0), Target(workload, "fused", _LIVE, 1.0)]
        found.append(Target(Workload("model", size, "training", "float32", 8), "fused", _LIVE, 1.6, memory=0.6))
    if has_bfloat16(device):
        workloads = [Workload("model", size, "inference", "bfloat16", n) for size in ("tiny", "small") for n in (1, 16)]
        found += [Target(workload, "frozen", _FREEZING, 1.3) for workload in workloads]
    return found


def judge(target: Target, result: Result) -> TargetResult:
    """Hold a workload's result to its target.

    A target is reached only where the whole interval of the ratio is, and missed only where none of it is.
    """
    entries = {entry.implementation: entry for entry in result.entries}
    ours, plain = entries[target.ours], entries["plain"]
    rivals = [entries[name] for name in target.rivals]
    timed = [entry for entry in rivals if entry.median is not None]
    if ours.median is None or not timed:
        lacking = [entry for entry in (ours, *rivals) if entry.median is None]
        return TargetResult(target, "", None, None, "missed" if ours.median is None else "open", _reasons(lacking))
    rival = min(timed, key=lambda entry: entry.median)
    ratio = median_ratio(rival.seconds, ours.seconds)
    memory = None if target.memory is None else ours.peak_bytes / plain.peak_bytes
    if ratio.high < target.speedup or (memory is not None and memory > target.memory):
        return TargetResult(target, rival.implementation, ratio, memory, "missed", "")
    lacking = [entry for entry in rivals if entry.median is None]
    if lacking or ratio.low < target.speedup:
        return TargetResult(
            target, rival.implementation, ratio, memory, "open", _reasons(lacking) or "the interval holds the target"
        )
    return TargetResult(target, rival.implementation, ratio, memory, "reached", "")


def target_rows(results: Sequence[TargetResult]) -> list[list[str]]:
    """The results as rows of a table, with the head."""
    rows = [
        ["workload", "ours", "fastest of the others", "target", "its time / ours", "99% interval", "memory", "verdict"]
    ]
    for result in results:
        target, ratio = result.target, result.ratio
        memory = "-" if result.memory is None else f"{result.memory:.2f} (at most {target.memory:.2f})"
        rows.append(
            [
                target.workload.name,
                target.ours,
                result.rival or "-",
                f"{target.speedup:.2f}",
                "-" if ratio is None else f"{ratio.value:.2f}",
                "-" if ratio is None else f"{ratio.low:.2f} to {ratio.high:.2f}",
                memory,
                f"{result.verdict}: {result.reason}" if result.reason else result.verdict,
            ]
        )
    return rows


def _reasons(entries: Sequence[Entry]) -> str:
    return "; ".join(f"{entry.implementation} {entry.status}: {entry.reason}" for entry in entries)
