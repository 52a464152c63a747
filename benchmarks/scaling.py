"""How time and memory of CeiT-T grow with batch, image size and depth, plain and fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .harness.implementations import ImplementationError
from .harness.measure import Clock, measure_workload
from .harness.statistics import fit_exponent
from .harness.workloads import Workload

IMPLEMENTATIONS = ("plain", "fused")
AXES: dict[str, Sequence[int]] = {
    "batch": (1, 2, 4, 8),
    "image side, pixels": (128, 192, 256, 320),
    "depth, blocks": (3, 6, 9, 12),
}
_GPU_BATCHES = (1, 4, 16, 64, 256)


def measure_scaling(
    device: torch.device,
    say: Callable[[str], None],
    *,
    clock: Clock,
    left_out: list[str],
    refused: list[str],
    seconds: float = 0.5,
    axes: dict[str, Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """Measure along each axis, inference and training.

    Args:
        device: where.
        say: takes lines of progress.
        clock: what the run may spend; points are left out when it is used up.
        left_out: takes the names of those.
        refused: takes a line for every implementation that computed something wrong or failed, and so has no point.
        seconds: to time each point.
        axes: sizes by axis; unless given, by the device.

    Returns:
        A curve for each axis, phase and implementation: sizes, seconds, peak bytes, and the fitted exponents of both.
    """
    if axes is None:
        axes = {**AXES, "batch": _GPU_BATCHES} if device.type == "cuda" else AXES
    curves = []
    for axis, sizes in axes.items():
        for phase in ("inference", "training"):
            points: dict[str, list[tuple[int, float, int | None]]] = {name: [] for name in IMPLEMENTATIONS}
            for size in sizes:
                if clock.used(1.0):
                    left_out.append(f"scaling, {axis} {size}, {phase}")
                    continue
                where = f"scaling, {axis} {size}, {phase}"
                say(where)
                try:
                    result = measure_workload(
                        _workload(axis, size, phase), device, seconds=seconds, implementations=IMPLEMENTATIONS
                    )
                except ImplementationError as error:
                    refused.append(f"{where}: plain failed: {error}")
                    continue
                for entry in result.entries:
                    if entry.median is not None:
                        points[entry.implementation].append((size, entry.median, entry.peak_bytes))
                    else:
                        refused.append(f"{where}: {entry.implementation} {entry.status}: {entry.reason}")
            curves += [_curve(axis, phase, name, found) for name, found in points.items() if len(found) > 1]
    return curves


def _workload(axis: str, size: int, phase: str) -> Workload:
    if axis == "batch":
        return Workload("model", "tiny", phase, "float32", size)
    if axis.startswith("image"):
        return Workload("model", "tiny", phase, "float32", 2, image_size=size)
    return Workload("model", "tiny", phase, "float32", 2, model_kwargs={"depth": size})


def _curve(
    axis: str, phase: str, implementation: str, points: Sequence[tuple[int, float, int | None]]
) -> dict[str, Any]:
    sizes, seconds, memory = (list(column) for column in zip(*points, strict=True))
    known = all(memory)
    return {
        "axis": axis,
        "phase": phase,
        "implementation": implementation,
        "sizes": sizes,
        "seconds": seconds,
        "peak_bytes": memory,
        "time_exponent": fit_exponent(sizes, seconds),
        "memory_exponent": fit_exponent(sizes, memory) if known else None,
    }
