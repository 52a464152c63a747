"""The report's pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, NullLocator

from .harness.implementations import OURS
from .harness.measure import Entry, Result
from .results import AXES, Curve, Report, scaling_curves

COLORS = {"plain": "#64748b", "compile": "#2563eb", "fused": "#c2410c", "frozen": "#f59e0b"}
OTHER_COLOR, INK = "#cbd5e1", "#0f172a"
OPERATOR_COLORS = {
    "leff": "#c2410c",
    "i2t": "#0f766e",
    "lca": "#7c3aed",
    "attention": "#be185d",
    "add_norm": "#a16207",
    "model": "#334155",
}
MARKERS = {"plain": "s", "compile": "^", "fused": "o", "frozen": "P"}


def draw_all(report: Report, folder: Path) -> dict[str, str]:
    """Draw what the report has data for.

    Returns:
        File names by title.
    """
    where, figures = f"measured on {report.machine}", {}
    for operator in dict.fromkeys(result.workload.operator for result in report.measured):
        results = [result for result in report.measured if result.workload.operator == operator]
        title = f"{operator}: speed against plain PyTorch, measured"
        figures[f"ratios-{operator}.png"] = title, ratio_bars(operator, results, where)
    title = "rooflines: measured here, and every kernel of the fused operators"
    figures["roofline.png"] = title, _rooflines(report, where)
    batches = batch_curves(report.measured, where)
    if batches is not None:
        figures["batches.png"] = "images/s and memory by batch, measured", batches
    curves = scaling_curves(report.results)
    if curves:
        figures["scaling.png"] = "scaling (see scaling.md)", _scaling_figure(curves, where)
    for name, (_, figure) in figures.items():
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / name, dpi=130)
    return {title: name for name, (title, _) in figures.items()}


def ratio_bars(operator: str, results: Sequence[Result], where: str) -> Figure:
    """A panel for each workload: plain / implementation with its interval; who was not timed is named at the axis."""
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(4.6 * columns, 0.5 + 3.4 * rows), layout="constrained")
    # The numbers at the right of a panel must not look as if they were of the next one.
    figure.get_layout_engine().set(w_pad=0.15)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, result in zip(panels, results, strict=False):
        # What is not for the workload at all is in the tables; here it would only be an empty line.
        _bars(axes, [e for e in result.entries if e.status != "absent" or "installed" in e.reason])
        it = result.workload
        axes.set_title(f"{it.size}, {it.phase}, {it.dtype}, batch {it.batch}", fontsize=10)
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    figure.suptitle(f"{operator}: speed relative to plain PyTorch (1 = plain, longer is faster)\n{where}", fontsize=11)
    return figure


def _bars(axes: Axes, entries: Sequence[Entry]) -> None:
    backends = [", ".join(sorted({by["backend"] for by in entry.backends.values()})) for entry in entries]
    names = [e.implementation + (f"\n({ran})" if ran else "") for e, ran in zip(entries, backends, strict=True)]
    intervals = [(r.value, r.value - r.low, r.high - r.value) if (r := e.ratio) else (0.0, 0.0, 0.0) for e in entries]
    values, *ends = np.array(intervals).T
    colors = [COLORS.get(entry.implementation, OTHER_COLOR) for entry in entries]
    axes.barh(names, values, color=colors, height=0.7)
    axes.errorbar(values, names, xerr=ends, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
    for i, (entry, value) in enumerate(zip(entries, values, strict=True)):
        text = f"{value:.2f}" if entry.ratio else entry.status
        axes.text(1.01, i, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.3 * max([1.0, *(value + above for value, _, above in intervals if above < 2 * value)]))
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()


def batch_curves(measured: Sequence[Result], where: str) -> Figure | None:
    """Images/s and memory of the models by batch; None where there are no two batches."""
    panels: dict[tuple[str, str, str], list[Result]] = {}
    for result in sorted(measured, key=lambda result: result.workload.batch):
        it = result.workload
        if it.operator == "model":
            panels.setdefault((it.size, it.phase, it.dtype), []).append(result)
    panels = {key: results for key, results in panels.items() if len(results) > 1}
    if not panels:
        return None
    figure = Figure(figsize=(9.5, 0.6 + 3.5 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for (speed, memory), ((size, phase, dtype), results) in zip(grid, panels.items(), strict=True):
        _by_batch(speed, results, lambda entry, batch: batch / entry.median)
        _by_batch(memory, results, lambda entry, batch: entry.peak_bytes and entry.peak_bytes / 1e6)
        speed.set_title(f"CeiT-{size} {phase}, {dtype}: images/s", fontsize=10)
        memory.set_title(f"CeiT-{size} {phase}, {dtype}: peak memory of a call, MB", fontsize=10)
    figure.suptitle(where, fontsize=11)
    return figure


def _by_batch(axes: Axes, results: Sequence[Result], value: Callable[[Entry, int], float | None]) -> None:
    for name in COLORS:
        timed = [(r.workload.batch, r[name]) for r in results if r[name] is not None and r[name].median is not None]
        points = [(batch, y) for batch, entry in timed if (y := value(entry, batch)) is not None]
        if points:
            style = "--" if name in OURS else "-"
            axes.plot(*zip(*points, strict=True), style, marker=MARKERS[name], color=COLORS[name], label=name)
    _log_sizes(axes, [result.workload.batch for result in results], "batch")
    axes.set_ylim(0, None)
    axes.legend(frameon=False, fontsize=8)


def _scaling_figure(curves: Sequence[Curve], where: str) -> Figure:
    """Time above memory for each axis, with the fitted exponents in the legends."""
    names = list(dict.fromkeys(curve.axis for curve in curves))
    figure = Figure(figsize=(4.4 * len(names), 8), layout="constrained")
    for (time, memory), name in zip(figure.subplots(2, len(names), squeeze=False).T, names, strict=True):
        for it in (curve for curve in curves if curve.axis == name):
            _plot_curve(time, it, [1e3 * seconds for seconds in it.seconds], it.time_exponent)
            if it.memory_exponent is not None:
                _plot_curve(memory, it, [peak / 1e6 for peak in it.peak_bytes], it.memory_exponent)
        title = AXES[name].split(",")[0]
        time.set(title=f"time of a call by {title}", ylabel="ms")
        memory.set(title=f"peak memory by {title}", ylabel="MB")
    figure.suptitle(f"CeiT-T, float32, {where}", fontsize=11)
    return figure


def _plot_curve(axes: Axes, curve: Curve, values: Sequence[float], exponent: float) -> None:
    axes.plot(
        curve.sizes,
        values,
        "--" if curve.implementation == "fused" else "-",
        marker="o" if curve.phase == "inference" else "D",
        color=COLORS[curve.implementation],
        markersize=5,
        label=f"{curve.implementation}, {curve.phase}: exponent {exponent:.2f}",
    )
    axes.set_yscale("log")
    _label_log_axis(axes.yaxis, axes.get_ylim())
    _log_sizes(axes, curve.sizes, AXES[curve.axis])
    _legend_below(axes, ncols=2, below=0.16)


def _log_sizes(axes: Axes, sizes: Sequence[int], label: str) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    axes.grid(alpha=0.25)


def _rooflines(report: Report, where: str) -> Figure:
    """Implementations under this machine's ceilings; the fused kernels as measured on a GPU and as modelled."""
    measured = [
        {**kernel, "operator": result.workload.operator, "phase": result.workload.phase}
        for result in report.measured
        for entry in result.entries
        for kernel in entry.kernels
    ]
    modelled = [{**kernel, "seconds": kernel["modelled_seconds"]} for kernel in report.modelled["kernels"]]
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
        _label_log_axis(axes.xaxis, axes.get_xlim())
        _label_log_axis(axes.yaxis, axes.get_ylim())
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
    _legend_below(axes, labels.values(), labels.keys(), ncols=5)
    axes.set_title(f"operators and models, {where}", fontsize=10)
    axes.set_xlabel("FLOP per byte of input, output and parameters")


def _kernels(axes: Axes, kernels: Sequence[dict[str, Any]], title: str) -> None:
    # Without FLOPs there is no intensity: at this one, the height below the roof is the share of the bandwidth.
    edge = min((kernel["flops"] / kernel["bytes"] for kernel in kernels if kernel["flops"]), default=1.0) / 4
    labels = {}
    for kernel in kernels:
        operator, phase, flops, moved = (kernel[name] for name in ("operator", "phase", "flops", "bytes"))
        labels[f"{operator}, {phase if flops else 'bytes alone'}"] = axes.plot(
            flops / moved if flops else edge,
            (flops or edge * moved) / kernel["seconds"] / 1e12,
            "<" if not flops else "o" if phase == "inference" else "D",
            color=OPERATOR_COLORS[operator],
            markersize=6,
            alpha=0.6,
        )[0]
    _legend_below(axes, labels.values(), labels.keys(), ncols=4)
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


def _label_log_axis(axis: Axis, limits: tuple[float, float]) -> None:
    """Plain numbers along a logarithmic axis: 1, 2, 5, 10 and so on, over many decades only the powers of ten."""
    low, high = limits
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,)))
    axis.set_major_formatter(FormatStrFormatter("%g"))


def _legend_below(axes: Axes, *labels: object, ncols: int, below: float = 0.12) -> None:
    """A small legend under the axes."""
    axes.legend(*labels, frameon=False, fontsize=7, ncols=ncols, loc="upper center", bbox_to_anchor=(0.5, -below))
