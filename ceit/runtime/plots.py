"""The demonstration's picture."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .checkpoints import write_atomically

# The fused curve lies on the plain one where all is well: thin and dashed, so that both are seen.
_STYLES = {
    "plain": {"color": "#9aa5b1", "linewidth": 3.5},
    "fused": {"color": "#c2410c", "linewidth": 1.3, "linestyle": (0, (4, 2))},
}


def draw_comparison(results: dict[str, dict[str, Any]], histories: dict[str, list[dict]], path: Path) -> None:
    """Draw the losses, the accuracies, images/s and memory of the plain and the fused run.

    Args:
        results: contents of `result.json` by kind.
        histories: records of the epochs by kind.
        path: the picture to write, a PNG.
    """
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    (losses, accuracies), (speeds, memories) = figure.subplots(2, 2, height_ratios=(3, 2))
    for kind, style in _STYLES.items():
        steps = results[kind]["step_losses"]
        losses.plot(range(1, len(steps) + 1), steps, label=kind, **style)
        epochs = histories[kind]
        accuracies.plot([e["epoch"] for e in epochs], [e["test_accuracy"] for e in epochs], label=kind, **style)
    losses.set(title="training loss", xlabel="step", ylim=(0, None))
    accuracies.set(title="test accuracy", xlabel="epoch", ylabel="%")
    accuracies.set_xticks([e["epoch"] for e in histories["plain"]][:: max(1, len(histories["plain"]) // 10)])
    _bars(speeds, "training speed", "images/s", {k: r["images_per_second"] for k, r in results.items()})
    device = results["plain"]["device"]
    _bars(
        memories,
        f"peak memory, {'tensors' if device.startswith('cuda') else 'process'}",
        "MB",
        {k: r["peak_memory_mb"] or 0.0 for k, r in results.items()},
    )
    for axes in (losses, accuracies):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"CeiT on scikit-learn's digits, plain and fused operators, on {device}")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _bars(axes: Axes, title: str, unit: str, values: dict[str, float]) -> None:
    colors = [_STYLES[kind]["color"] for kind in values]
    bars = axes.barh(list(values), list(values.values()), color=colors, height=0.6)
    axes.bar_label(bars, fmt="{:,.0f}", padding=4)
    axes.set(title=title, xlabel=unit, xlim=(0, 1.18 * max(values.values()) or 1))
    axes.invert_yaxis()
