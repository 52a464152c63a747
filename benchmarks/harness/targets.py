"""The targets: by how much the fused operators have to beat the best that is free, and whether they do here.

Who prepares a model once is held against a frozen model, who follows every change of its weights against a live one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ceit_kernels.common.extension import cpu_code

from ..workloads import Workload, has_bfloat16, others_plan
from .implementations import missing_packages
from .instructions import UNLIMITED, exceeding
from .measure import Result
from .statistics import Ratio, median_ratio


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
        verdict: "reached", "missed", or "open" where the interval of the ratio holds the target or a rival is lacking.
        reason: why it is open or without a result.
        rival: the fastest one that was timed; "-" if there is no result.
        ratio: its time / our time.
        memory: our peak memory / plain PyTorch's, where there is a target for it.
    """

    target: Target
    verdict: str
    reason: str = ""
    rival: str = "-"
    ratio: Ratio | None = None
    memory: float | None = None

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}" if self.reason else self.verdict


_LIVE = ("plain", "compile")
_FREEZING = ("compile-freezing",)
_PREPARED = (*_FREEZING, "openvino", "onnxruntime")
_OPTIONAL = "zentorch"  # whose lack leaves no target open


@dataclass(frozen=True)
class _Speedups:
    """Of LeFF and of whole models."""

    leff_inference: float
    leff_training: float
    inference: float
    training: float


_AVX512, _LESS = _Speedups(1.2, 1.25, 1.0, 1.6), _Speedups(1.2, 1.25, 1.15, 1.35)


def targets_of(device: torch.device) -> list[Target]:
    """The targets for a device, by the instructions that it runs; none for a GPU."""
    if device.type != "cpu":
        return []
    found, least = [], _AVX512 if (cpu_code() or "").startswith("avx512") else _LESS
    freezing, prepared = _with_optional(_FREEZING), _prepared()
    for size in ("tiny", "small"):
        found += [
            Target(Workload("leff", size, "inference", "float32", 16), "frozen", freezing, least.leff_inference),
            Target(Workload("leff", size, "training", "float32", 16), "fused", ("plain",), least.leff_training),
            Target(Workload("model", size, "training", "float32", 8), "fused", _LIVE, least.training, memory=0.6),
        ]
        for workload in (Workload("model", size, "inference", "float32", n) for n in (1, 16)):
            found += [Target(workload, "frozen", prepared, least.inference), Target(workload, "fused", _LIVE, 1.0)]
    if has_bfloat16(device):
        workloads = [Workload("model", size, "inference", "bfloat16", n) for size in ("tiny", "small") for n in (1, 16)]
        found += [Target(workload, "frozen", freezing, 1.3) for workload in workloads]
    return found


def targets_of_others(device: torch.device) -> list[Target]:
    """The targets of other libraries' models for a device; none for a GPU."""
    if device.type != "cpu":
        return []
    found = []
    for workload in others_plan():
        if workload.training:
            found.append(Target(workload, "fused", _LIVE, 1.2))
        else:
            found += [Target(workload, "frozen", _prepared(), 1.0), Target(workload, "fused", ("plain",), 1.15)]
    return found


def _prepared() -> tuple[str, ...]:
    """Who prepares a model once and takes no more than the instructions that are allowed."""
    return tuple(name for name in _with_optional(_PREPARED) if not (exceeding() and name in UNLIMITED))


def _with_optional(rivals: tuple[str, ...]) -> tuple[str, ...]:
    return rivals if missing_packages(_OPTIONAL) or exceeding() else (*rivals, _OPTIONAL)


def judge(target: Target, result: Result) -> TargetResult:
    """Hold a workload's result to its target.

    A target is reached only where the whole interval of the ratio is, and missed only where none of it is.
    """
    ours, rivals = result[target.ours], [result[name] for name in target.rivals]
    lacking = [entry for entry in (ours, *rivals) if entry.median is None]
    reason = "; ".join(f"{entry.implementation} {entry.status}: {entry.reason}" for entry in lacking)
    timed = [entry for entry in rivals if entry.median is not None]
    if ours.median is None or not timed:
        return TargetResult(target, "missed" if ours.median is None else "open", reason)
    rival = min(timed, key=lambda entry: entry.median)
    ratio = median_ratio(rival.seconds, ours.seconds)
    memory = None if target.memory is None else ours.peak_bytes / result["plain"].peak_bytes
    found = partial(TargetResult, target, rival=rival.implementation, ratio=ratio, memory=memory)
    if ratio.high < target.speedup or (memory is not None and memory > target.memory):
        return found("missed")
    if ratio.low < target.speedup:
        reason = reason or "the interval holds the target"
    return found("open", reason) if reason else found("reached")


def target_rows(results: Sequence[TargetResult]) -> list[list[str]]:
    """The results as rows of a table, with the head."""
    head = ["workload", "ours", "fastest of the others", "target", "its time / ours", "99% interval"]
    rows = [[*head, "memory", "verdict"]]
    for result in results:
        target = result.target
        ratio = ["-", "-"] if result.ratio is None else result.ratio.cells()
        memory = "-" if result.memory is None else f"{result.memory:.2f} (at most {target.memory:.2f})"
        names = [target.workload.name, target.ours, result.rival]
        rows.append([*names, f"{target.speedup:.2f}", *ratio, memory, str(result)])
    return rows
