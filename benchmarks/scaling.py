"""How time and memory of CeiT-T grow with the batch, the image's side and the depth, plain and fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .harness.measure import Result
from .harness.statistics import fit_exponent

AXES = {"batch": "batch", "image_size": "image side, pixels", "depth": "depth, blocks"}


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
