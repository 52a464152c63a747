"""The rooflines: what was measured here, and every kernel of the fused operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .harness.implementations import OURS
from .style import MARKERS, OPERATOR_COLORS, label_log_axis, subtitle

_INK = "#0f172a"


def rooflines(data: Mapping[str, Any]) -> Figure:
    """Implementations under this machine's ceilings; the fused kernels as measured on a GPU and as modelled.

    A kernel is (operator, phase, bytes, flops, seconds).
    """
    measured = measured_kernels(data)
    figure = Figure(figsize=(19.5 if measured else 13, 5.8), layout="constrained")
    here, *kernel_axes = figure.subplots(1, 3 if measured else 2)
    _implementations(here, data)
    if measured:
        roofs = {dtype: (c["bytes_per_second"], c["flops_per_second"]) for dtype, c in data["ceilings"].items()}
        _kernels(kernel_axes[0], measured, roofs, f"every kernel of the fused operators,\n{subtitle(data)}")
    given = data["modelled"]["assumptions"]
    _kernels(
        kernel_axes[-1],
        [
            (k["operator"], k["phase"], k["bytes"], k["flops"], k["modelled_seconds"])
            for k in data["modelled"]["kernels"]
        ],
        {"H100, bfloat16": (given["bytes_per_second"], given["flops_per_second"])},
        "every kernel of the fused operators,\nMODELLED for an H100, not measured",
    )
    for axes in (here, *kernel_axes):
        axes.set(xscale="log", yscale="log", ylabel="TFLOP/s")
        axes.grid(alpha=0.25, which="major")
        label_log_axis(axes.xaxis, axes.get_xlim())
        label_log_axis(axes.yaxis, axes.get_ylim())
    return figure


def measured_kernels(data: Mapping[str, Any]) -> list[tuple[str, str, int, int, float]]:
    """Every fused kernel that was timed on a GPU: operator or "model", phase, bytes, flops, seconds."""
    return [
        (
            result["workload"]["operator"],
            result["workload"]["phase"],
            kernel["bytes"],
            kernel["flops"],
            kernel["seconds"],
        )
        for result in data["measured"]
        for entry in result["entries"]
        for kernel in entry.get("kernels", ())
    ]


def _implementations(axes: Axes, data: Mapping[str, Any]) -> None:
    labels: dict[str, Any] = {}
    for result in data["measured"]:
        for entry in result["entries"]:
            marker = MARKERS.get(entry["implementation"])
            if marker and entry["seconds"] and result["flops"]:
                operator = result["workload"]["operator"]
                labels[f"{operator}, {entry['implementation']}"] = axes.plot(
                    result["flops"] / result["compulsory_bytes"],
                    result["flops"] / median(entry["seconds"]) / 1e12,
                    marker,
                    color=OPERATOR_COLORS[operator],
                    markersize=7,
                    alpha=0.75,
                    fillstyle="full" if entry["implementation"] in OURS else "none",
                )[0]
    for dtype, ceilings in data["ceilings"].items():
        _roof(axes, ceilings["bytes_per_second"], ceilings["flops_per_second"], dtype, _intensities(axes))
    below = {"frameon": False, "fontsize": 7, "ncols": 5, "loc": "upper center", "bbox_to_anchor": (0.5, -0.12)}
    axes.legend(labels.values(), labels.keys(), **below)
    axes.set_title(f"operators and models, {subtitle(data)}", fontsize=10)
    axes.set_xlabel("FLOP per byte of input, output and parameters")


def _kernels(
    axes: Axes,
    kernels: Sequence[tuple[str, str, int, int, float]],
    roofs: Mapping[str, tuple[float, float]],
    title: str,
) -> None:
    with_products = [flops / size for _, _, size, flops, _ in kernels if flops]
    # Without products there is no intensity: at this one, the height below the roof is the share of the bandwidth.
    edge = min(with_products, default=1.0) / 4
    labels: dict[str, Any] = {}
    for operator, phase, size, flops, seconds in kernels:
        label = f"{operator}, {phase}" if flops else f"{operator}, bytes alone"
        labels[label] = axes.plot(
            flops / size if flops else edge,
            (flops or edge * size) / seconds / 1e12,
            "<" if not flops else "o" if phase == "inference" else "D",
            color=OPERATOR_COLORS[operator],
            markersize=6,
            alpha=0.6,
        )[0]
    for name, (memory, arithmetic) in roofs.items():
        _roof(axes, memory, arithmetic, name, _intensities(axes))
    axes.legend(
        labels.values(),
        labels.keys(),
        frameon=False,
        fontsize=7,
        ncols=4,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
    )
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("FLOP per byte that the kernel moves")


def _intensities(axes: Axes) -> tuple[float, float]:
    points: Iterable[Any] = (line for line in axes.lines if line.get_gid() != "roof")
    found = [float(x) for line in points for x in line.get_xdata()]
    return (min(found) / 2, max(found) * 2) if found else (0.1, 1000.0)


def _roof(axes: Axes, memory: float, arithmetic: float, name: str, ends: tuple[float, float]) -> None:
    x = np.geomspace(*ends, 100)
    lines = sum(artist.get_gid() == "roof" for artist in axes.texts)
    style = ("-", "--", ":")[lines % 3]
    axes.plot(x, np.minimum(x * memory, arithmetic) / 1e12, style, color=_INK, linewidth=1.2, gid="roof")
    text = f"{style} {name}: {memory / 1e9:,.0f} GB/s, {arithmetic / 1e12:,.3g} TFLOP/s"
    axes.text(0.98, 0.03 + 0.05 * lines, text, transform=axes.transAxes, ha="right", fontsize=8, gid="roof")
