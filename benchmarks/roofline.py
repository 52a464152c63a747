"""The rooflines: what was measured here, and every kernel of the fused operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .harness.implementations import OURS
from .results import Report
from .style import INK, MARKERS, OPERATOR_COLORS, label_log_axis, legend_below


class Point(NamedTuple):
    """A kernel: of which operator or "model" and phase, its bytes, FLOPs and seconds."""

    operator: str
    phase: str
    bytes: int
    flops: int
    seconds: float


def rooflines(report: Report, where: str) -> Figure:
    """Implementations under this machine's ceilings; the fused kernels as measured on a GPU and as modelled."""
    measured = [
        Point(result.workload.operator, result.workload.phase, k["bytes"], k["flops"], k["seconds"])
        for result in report.measured
        for entry in result.entries
        for k in entry.kernels
    ]
    modelled = [
        Point(k["operator"], k["phase"], k["bytes"], k["flops"], k["modelled_seconds"])
        for k in report.modelled["kernels"]
    ]
    figure = Figure(figsize=(19.5 if measured else 13, 5.8), layout="constrained")
    here, *kernel_axes = figure.subplots(1, 3 if measured else 2)
    _implementations(here, report, where)
    if measured:
        _kernels(kernel_axes[0], measured, f"every kernel of the fused operators,\n{where}")
        _roofs(kernel_axes[0], report.ceilings)
    _kernels(kernel_axes[-1], modelled, "every kernel of the fused operators,\nMODELLED for an H100, not measured")
    _roofs(kernel_axes[-1], {"H100, bfloat16": report.modelled["assumptions"]})
    for axes in (here, *kernel_axes):
        axes.set(xscale="log", yscale="log", ylabel="TFLOP/s")
        axes.grid(alpha=0.25, which="major")
        label_log_axis(axes.xaxis, axes.get_xlim())
        label_log_axis(axes.yaxis, axes.get_ylim())
    return figure


def _implementations(axes: Axes, report: Report, where: str) -> None:
    labels = {}
    for result in report.measured:
        for entry in result.entries:
            marker, operator = MARKERS.get(entry.implementation), result.workload.operator
            if marker and entry.median and result.flops:
                labels[f"{operator}, {entry.implementation}"] = axes.plot(
                    result.flops / result.compulsory_bytes,
                    result.flops / entry.median / 1e12,
                    marker,
                    color=OPERATOR_COLORS[operator],
                    markersize=7,
                    alpha=0.75,
                    fillstyle="full" if entry.implementation in OURS else "none",
                )[0]
    _roofs(axes, report.ceilings)
    legend_below(axes, labels.values(), labels.keys(), ncols=5)
    axes.set_title(f"operators and models, {where}", fontsize=10)
    axes.set_xlabel("FLOP per byte of input, output and parameters")


def _kernels(axes: Axes, kernels: Sequence[Point], title: str) -> None:
    # Without FLOPs there is no intensity: at this one, the height below the roof is the share of the bandwidth.
    edge = min((kernel.flops / kernel.bytes for kernel in kernels if kernel.flops), default=1.0) / 4
    labels = {}
    for it in kernels:
        labels[f"{it.operator}, {it.phase if it.flops else 'bytes alone'}"] = axes.plot(
            it.flops / it.bytes if it.flops else edge,
            (it.flops or edge * it.bytes) / it.seconds / 1e12,
            "<" if not it.flops else "o" if it.phase == "inference" else "D",
            color=OPERATOR_COLORS[it.operator],
            markersize=6,
            alpha=0.6,
        )[0]
    legend_below(axes, labels.values(), labels.keys(), ncols=4)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("FLOP per byte that the kernel moves")


def _roofs(axes: Axes, ceilings: dict[str, dict[str, float]]) -> None:
    found = [float(x) for line in axes.lines for x in line.get_xdata()] or [0.2, 500.0]
    x = np.geomspace(min(found) / 2, 2 * max(found), 100)
    for i, (name, ceiling) in enumerate(ceilings.items()):
        memory, arithmetic, style = ceiling["bytes_per_second"], ceiling["flops_per_second"], ("-", "--", ":")[i % 3]
        axes.plot(x, np.minimum(x * memory, arithmetic) / 1e12, style, color=INK, linewidth=1.2)
        text = f"{style} {name}: {memory / 1e9:,.0f} GB/s, {arithmetic / 1e12:,.3g} TFLOP/s"
        axes.text(0.98, 0.03 + 0.05 * i, text, transform=axes.transAxes, ha="right", fontsize=8)
