"""The report's pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .harness.implementations import OURS
from .roofline import rooflines
from .style import COLORS, MARKERS, OTHER_COLOR, label_log_axis, subtitle


def draw_all(data: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draw what the report has data for.

    Returns:
        File names by title.
    """
    pictures = {}
    for operator in dict.fromkeys(result["workload"]["operator"] for result in data["measured"]):
        results = [result for result in data["measured"] if result["workload"]["operator"] == operator]
        _save(ratio_bars(operator, results, subtitle(data)), folder / f"ratios-{operator}.png")
        pictures[f"{operator}: speed against plain PyTorch, measured"] = f"ratios-{operator}.png"
    _save(rooflines(data), folder / "roofline.png")
    pictures["rooflines: measured here, and every kernel of the fused operators"] = "roofline.png"
    batches = batch_curves(data)
    if batches is not None:
        _save(batches, folder / "batches.png")
        pictures["images/s and memory by batch, measured"] = "batches.png"
    if data["scaling"]:
        _save(scaling_curves(data), folder / "scaling.png")
        pictures["scaling (see scaling.md)"] = "scaling.png"
    return pictures


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def ratio_bars(operator: str, results: Sequence[Mapping[str, Any]], where: str) -> Figure:
    """A panel for each workload: plain / implementation with its interval; who was not timed is named at the axis."""
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(4.6 * columns, 0.5 + 3.4 * rows), layout="constrained")
    # The numbers at the right of a panel must not look as if they were of the next one.
    figure.get_layout_engine().set(w_pad=0.15)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, result in zip(panels, results, strict=False):
        # What is not for the workload at all is in the tables; here it would only be an empty line.
        entries = [e for e in result["entries"] if e["status"] != "absent" or "installed" in e["reason"]]
        _bars(axes, entries)
        workload = result["workload"]
        axes.set_title(
            f"{workload['size']}, {workload['phase']}, {workload['dtype']}, batch {workload['batch']}", fontsize=10
        )
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    figure.suptitle(f"{operator}: speed relative to plain PyTorch (1 = plain, longer is faster)\n{where}", fontsize=11)
    return figure


def _bars(axes: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    names = [_label(entry) for entry in entries]
    values = [entry["ratio"]["value"] if entry["ratio"] else 0.0 for entry in entries]
    ends = [
        (e["ratio"]["value"] - e["ratio"]["low"], e["ratio"]["high"] - e["ratio"]["value"]) if e["ratio"] else (0, 0)
        for e in entries
    ]
    colors = [COLORS.get(entry["implementation"], OTHER_COLOR) for entry in entries]
    axes.barh(names, values, color=colors, height=0.7)
    axes.errorbar(values, names, xerr=np.array(ends).T, fmt="none", ecolor="#0f172a", elinewidth=0.9, capsize=2)
    limit = 1.3 * max(
        [1.0, *(value + above for value, (_, above) in zip(values, ends, strict=True) if above < 2 * value)]
    )
    for i, (entry, value) in enumerate(zip(entries, values, strict=True)):
        text = f"{value:.2f}" if entry["ratio"] else entry["status"]
        axes.text(1.01, i, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.axvline(1, color="#0f172a", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, limit)
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()


def _label(entry: Mapping[str, Any]) -> str:
    name = entry["implementation"]
    if not entry["backends"]:
        return name
    return f"{name}\n({', '.join(sorted({by['backend'] for by in entry['backends'].values()}))})"


def batch_curves(data: Mapping[str, Any]) -> Figure | None:
    """Images/s and memory of the models by batch; None where there are no two batches."""
    panels: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for result in data["measured"]:
        workload = result["workload"]
        if workload["operator"] == "model":
            panels.setdefault((workload["size"], workload["phase"], workload["dtype"]), []).append(result)
    panels = {key: sorted(rs, key=lambda r: r["workload"]["batch"]) for key, rs in panels.items() if len(rs) > 1}
    if not panels:
        return None
    figure = Figure(figsize=(9.5, 0.6 + 3.5 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for (speed, memory), ((size, phase, dtype), results) in zip(grid, panels.items(), strict=True):
        _by_batch(speed, results, lambda entry, batch: batch / median(entry["seconds"]))
        _by_batch(memory, results, lambda entry, batch: entry["peak_bytes"] and entry["peak_bytes"] / 1e6)
        speed.set_title(f"CeiT-{size} {phase}, {dtype}: images/s", fontsize=10)
        memory.set_title(f"CeiT-{size} {phase}, {dtype}: peak memory of a call, MB", fontsize=10)
    figure.suptitle(subtitle(data), fontsize=11)
    return figure


def _by_batch(axes: Axes, results: Sequence[Mapping[str, Any]], value: Callable[..., float | None]) -> None:
    for name in COLORS:
        points = [
            (result["workload"]["batch"], value(entry, result["workload"]["batch"]))
            for result in results
            for entry in result["entries"]
            if entry["implementation"] == name and entry["seconds"]
        ]
        points = [point for point in points if point[1] is not None]
        if points:
            style = "--" if name in OURS else "-"
            axes.plot(*zip(*points, strict=True), style, marker=MARKERS[name], color=COLORS[name], label=name)
    _log_sizes(axes, [result["workload"]["batch"] for result in results], "batch")
    axes.set_ylim(0, None)
    axes.legend(frameon=False, fontsize=8)


def scaling_curves(data: Mapping[str, Any]) -> Figure:
    """Time above memory for each axis, with the fitted exponents in the legends."""
    axes_names = list(dict.fromkeys(curve["axis"] for curve in data["scaling"]))
    figure = Figure(figsize=(4.4 * len(axes_names), 8), layout="constrained")
    grid = figure.subplots(2, len(axes_names), squeeze=False)
    for column, name in enumerate(axes_names):
        curves = [curve for curve in data["scaling"] if curve["axis"] == name]
        _scaling_panel(grid[0][column], curves, "seconds", 1e3, "time_exponent")
        _scaling_panel(grid[1][column], curves, "peak_bytes", 1e-6, "memory_exponent")
        grid[0][column].set(title=f"time of a call by {name.split(',')[0]}", ylabel="ms")
        grid[1][column].set(title=f"peak memory by {name.split(',')[0]}", ylabel="MB")
    figure.suptitle(f"CeiT-T, float32, {subtitle(data)}", fontsize=11)
    return figure


def _scaling_panel(axes: Axes, curves: Iterable[Mapping[str, Any]], key: str, unit: float, exponent: str) -> None:
    for curve in curves:
        if curve[exponent] is not None:
            axes.plot(
                curve["sizes"],
                [unit * value for value in curve[key]],
                "--" if curve["implementation"] == "fused" else "-",
                marker="o" if curve["phase"] == "inference" else "D",
                color=COLORS[curve["implementation"]],
                markersize=5,
                label=f"{curve['implementation']}, {curve['phase']}: exponent {curve[exponent]:.2f}",
            )
            axes.set_yscale("log")
            label_log_axis(axes.yaxis, axes.get_ylim())
            _log_sizes(axes, curve["sizes"], curve["axis"])
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _log_sizes(axes: Axes, sizes: Sequence[int], label: str) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    axes.grid(alpha=0.25)
