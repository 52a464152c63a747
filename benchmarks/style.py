"""What all pictures share: colors, marks and axes."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

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


def label_log_axis(axis: Axis, limits: tuple[float, float]) -> None:
    """Plain numbers along a logarithmic axis: 1, 2, 5, 10 and so on, over many decades only the powers of ten."""
    low, high = limits
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,)))
    axis.set_major_formatter(FormatStrFormatter("%g"))


def legend_below(axes: Axes, *labels: object, ncols: int, below: float = 0.12) -> None:
    """A small legend under the axes."""
    axes.legend(*labels, frameon=False, fontsize=7, ncols=ncols, loc="upper center", bbox_to_anchor=(0.5, -below))
