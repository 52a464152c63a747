"""What a run of the benchmarks measured, and how time and memory of CeiT-T grow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .harness.implementations import OURS
from .harness.measure import Result
from .harness.statistics import fit_exponent

AXES = {"batch": "batch", "image_size": "image side, pixels", "depth": "depth, blocks"}
_LONG_CALL_SECONDS = 0.01


@dataclass
class Report:
    """What a run measured.

    Attributes:
        command: that made it.
        environment: see `machine.environment`.
        ceilings: see `machine.measure_ceilings`, by dtype.
        results: of the workloads.
        left_out: names of workloads for which no time was left.
        modelled: see `traffic.model_gpu`; empty until the report is written.
        seconds: that the run took.
    """

    command: str
    environment: dict[str, Any]
    ceilings: dict[str, dict[str, float]]
    results: list[Result]
    left_out: list[str]
    modelled: dict[str, Any]
    seconds: float

    @classmethod
    def load(cls, path: Path) -> Report:
        """The report of a file that `write_report` wrote."""
        stored = json.loads(path.read_text())
        return cls(**{**stored, "results": [Result.from_dict(result) for result in stored["results"]]})

    @property
    def measured(self) -> list[Result]:
        """The results that are no points of scaling curves."""
        return [result for result in self.results if not result.workload.axis]

    @property
    def machine(self) -> str:
        """Where it was measured, in words."""
        # Reports from before have no instructions.
        words = self.environment["chip"], self.environment.get("instructions"), f"{self.environment['threads']} threads"
        return ", ".join(word for word in words if word)

    def again(self, workload: str) -> str:
        """The command that measures a workload again; those of a quick run are in no other plan."""
        return f"python -m benchmarks {'--quick ' if '--quick' in self.command else ''}--only {workload}"

    def disturbances(self) -> list[str]:
        """Signs that something else used the machine: the same code at another speed, or a rate beyond a ceiling."""
        signs = []
        for result in self.measured:
            name, ceiling = result.workload.name, self.ceilings[result.workload.dtype]["flops_per_second"]
            # Other runtimes choose their own algorithms, a matmul of theirs may beat this one; fused LCA needs a sixth
            # of plain's FLOPs.
            same_matmuls = ("plain",) if result.workload.operator == "lca" else ("plain", *OURS)
            for entry in (e for e in result.entries if e.median is not None):
                if result.flops / entry.median > 1.1 * ceiling and entry.implementation in same_matmuls:
                    signs.append(f"{name}: {entry.implementation} is above the ceiling of a matmul")
                same_code = {by["backend"] for by in entry.backends.values()} == {"reference"}
                # To choose the reference takes the fused modules some time, which shows in a short call.
                slower = entry.ratio.value < 0.9 and entry.median > _LONG_CALL_SECONDS
                if same_code and (slower or entry.ratio.value > 1.1):
                    share = f"1/{entry.ratio.value:.2f} of its time"
                    signs.append(f"{name}: {entry.implementation} is plain PyTorch here, yet took {share}")
        return signs

    def warning(self) -> list[str]:
        """A paragraph on disturbances, if there were any."""
        signs = "; ".join(self.disturbances())
        return [f"**The machine was disturbed; do not rely on these times.** {signs}."] if signs else []


@dataclass
class Curve:
    """The times of an implementation along an axis, and the exponents p of time and memory ~ size ** p.

    Attributes:
        axis: one of `AXES`.
        phase: "inference" or "training".
        implementation: "plain" or "fused".
        sizes: along the axis.
        seconds: of a call, the median at each size.
        peak_bytes: allocated during a call at its peak, at each size.
        time_exponent: of the seconds.
        memory_exponent: of the peak bytes; None where one is not known.
    """

    axis: str
    phase: str
    implementation: str
    sizes: Sequence[int]
    seconds: Sequence[float]
    peak_bytes: Sequence[int | None]
    time_exponent: float
    memory_exponent: float | None


def scaling_curves(results: Sequence[Result]) -> list[Curve]:
    """The curves that have two points or more."""
    points: dict[tuple[str, str, str], list[tuple[int, float, int | None]]] = {}
    for workload, entries in ((r.workload, r.entries) for r in results if r.workload.axis):
        for entry in (e for e in entries if e.median is not None):
            curve = points.setdefault((workload.axis, workload.phase, entry.implementation), [])
            curve.append((getattr(workload, workload.axis), entry.median, entry.peak_bytes))
    curves = []
    for names, found in points.items():
        if len(found) > 1:
            sizes, seconds, memory = zip(*found, strict=True)
            memory_exponent = fit_exponent(sizes, memory) if all(memory) else None
            curves.append(Curve(*names, sizes, seconds, memory, fit_exponent(sizes, seconds), memory_exponent))
    return curves
