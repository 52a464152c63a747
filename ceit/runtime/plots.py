"""Pictures of runs: curves, confusions, the demonstration's comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .files import write_atomically

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
    _save(figure, path)


def draw_curves(step_losses: Sequence[float], history: Sequence[dict[str, float]], path: Path) -> None:
    """Draw a run's losses, accuracies and learning rate over its epochs, as a PNG."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    losses, accuracies, rates = figure.subplots(1, 3)
    epochs = [record["epoch"] for record in history]
    steps = [len(history) * (i + 1) / len(step_losses) for i in range(len(step_losses))]
    losses.plot(steps, step_losses, label="training, each step", color="#9aa5b1", linewidth=0.8)
    losses.plot(epochs, [record["test_loss"] for record in history], label="test", color="#c2410c")
    for name, label in (("test_accuracy", "top-1"), ("test_top5", "top-5")):
        accuracies.plot(epochs, [record.get(name) for record in history], label=label)
    rates.plot(epochs, [record["lr"] for record in history])
    losses.set(title="loss", xlabel="epoch")
    accuracies.set(title="test accuracy", xlabel="epoch", ylabel="%")
    rates.set(title="learning rate", xlabel="epoch", yscale="log")
    for axes in (losses, accuracies):
        axes.legend(frameon=False)
    _save(figure, path)


def draw_confusion(confusion: Tensor, classes: Sequence[str], path: Path) -> None:
    """Draw the share of each class's images (rows) that the model takes for each class (columns), as a PNG."""
    shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1))[: len(classes), : len(classes)]
    side = 2.5 + min(0.3 * len(classes), 12)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1), label="share of the class's images")
    if len(classes) <= 40:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="answer", ylabel="class")
    _save(figure, path)


def draw_attention(image: Any, attention: Tensor, title: str, path: Path) -> None:
    """Draw an image beside the attention (heads, layers) that LCA pays to the class tokens of the layers, as a PNG."""
    heads, layers = attention.shape
    weights = attention.numpy()
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    picture, by_head, mean = figure.subplots(1, 3, width_ratios=(1, 1.5, 1.5))
    picture.imshow(image)
    picture.set_axis_off()
    shown = by_head.imshow(weights, cmap="Blues", vmin=0, aspect="auto", extent=(0.5, layers + 0.5, heads + 0.5, 0.5))
    figure.colorbar(shown, ax=by_head)
    by_head.set(title="attention to the layers' class tokens", xlabel="layer", ylabel="head")
    mean.bar(range(1, layers + 1), weights.mean(0), color=_STYLES["fused"]["color"])
    mean.set(title="mean over the heads", xlabel="layer", ylim=(0, None))
    figure.suptitle(title)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _bars(axes: Axes, title: str, unit: str, values: dict[str, float]) -> None:
    colors = [_STYLES[kind]["color"] for kind in values]
    bars = axes.barh(list(values), list(values.values()), color=colors, height=0.6)
    axes.bar_label(bars, fmt="{:,.0f}", padding=4)
    axes.set(title=title, xlabel=unit, xlim=(0, 1.18 * max(values.values()) or 1))
    axes.invert_yaxis()
