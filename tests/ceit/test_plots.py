"""What pictures show: the numbers, their axes and their names. How they look is nobody's promise."""

from pathlib import Path

import pytest
import torch
from numpy.testing import assert_allclose

from ceit.runtime import plots


@pytest.fixture
def drawn(monkeypatch):
    """Draw by a function, and return the picture instead of writing it."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))

    def draw(function, *arguments):
        function(*arguments, Path("picture.png"))
        return figures[-1]

    return draw


def curves(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def names(axes):
    return axes.get_title(), axes.get_xlabel(), axes.get_ylabel()


def test_a_run_is_drawn_over_its_epochs(drawn):
    history = [
        {"epoch": 1, "test_loss": 0.9, "test_accuracy": 50.0, "test_top5": 80.0, "lr": 1e-3},
        {"epoch": 2, "test_loss": 0.7, "test_accuracy": 60.0, "test_top5": 90.0, "lr": 1e-4},
    ]
    losses, accuracies, rates = drawn(plots.draw_curves, [4.0, 3.0, 2.0, 1.0], history).axes
    assert curves(losses) == {
        "training, each step": ([0.5, 1.0, 1.5, 2.0], [4.0, 3.0, 2.0, 1.0]),
        "test": ([1, 2], [0.9, 0.7]),
    }
    assert curves(accuracies) == {"top-1": ([1, 2], [50.0, 60.0]), "top-5": ([1, 2], [80.0, 90.0])}
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in rates.lines] == [([1, 2], [1e-3, 1e-4])]
    assert rates.get_yscale() == "log"
    assert [names(axes) for axes in (losses, accuracies, rates)] == [
        ("loss", "epoch", ""),
        ("test accuracy", "epoch", "%"),
        ("learning rate", "epoch", ""),
    ]
    assert losses.get_legend()
    assert accuracies.get_legend()


@pytest.mark.parametrize(("device", "memory"), [("cpu", "process"), ("cuda:0", "tensors")])
def test_two_runs_are_drawn_side_by_side(drawn, device, memory):
    results, histories = {}, {}
    for kind, factor in (("plain", 1.0), ("fused", 2.0)):
        speeds = {"images_per_second": 100 * factor, "peak_memory_mb": None if factor == 1 else 500.0}
        results[kind] = {"step_losses": [3 * factor, 2 * factor], "device": device, **speeds}
        histories[kind] = [{"epoch": i, "test_accuracy": i * factor} for i in range(1, 26)]
    figure = drawn(plots.draw_comparison, results, histories)
    losses, accuracies, speeds, memories = figure.axes
    assert curves(losses) == {"plain": ([1, 2], [3.0, 2.0]), "fused": ([1, 2], [6.0, 4.0])}
    assert {name: points[1] for name, points in curves(accuracies).items()} == {
        "plain": list(range(1, 26)),
        "fused": list(range(2, 51, 2)),
    }
    assert list(accuracies.get_xticks()) == list(range(1, 26, 2))
    assert [[bar.get_width() for bar in axes.patches] for axes in (speeds, memories)] == [[100, 200], [0, 500]]
    for axes in (speeds, memories):
        assert [label.get_text() for label in axes.get_yticklabels()] == ["plain", "fused"]
        assert axes.yaxis_inverted()
        assert axes.get_xlim()[1] > max(bar.get_width() for bar in axes.patches)
    assert [text.get_text() for text in speeds.texts] == ["100", "200"]
    assert [names(axes) for axes in figure.axes] == [
        ("training loss", "step", ""),
        ("test accuracy", "epoch", "%"),
        ("training speed", "images/s", ""),
        (f"peak memory, {memory}", "MB", ""),
    ]
    assert losses.get_ylim()[0] == 0
    assert losses.get_legend()
    assert accuracies.get_legend()


@pytest.mark.parametrize("count", [2, 40, 41])
def test_confusions_are_shares_of_a_class(drawn, count):
    confusion = torch.zeros(count + 1, count + 1, dtype=torch.int64)
    confusion[0, 0], confusion[0, 1], confusion[1, 1] = 3, 1, 2  # the others have no images
    classes = [f"class {i}" for i in range(count)]
    figure = drawn(plots.draw_confusion, confusion, classes)
    axes, side = figure.axes[0], 2.5 + min(0.3 * count, 12)  # inches
    assert tuple(figure.get_size_inches()) == (side + 1, side)
    expected = torch.zeros(count, count)
    expected[0, 0], expected[0, 1], expected[1, 1] = 0.75, 0.25, 1.0
    assert_allclose(axes.images[0].get_array(), expected)
    assert axes.images[0].get_clim() == (0, 1)
    assert names(axes) == ("", "answer", "class")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert ([label.get_text() for label in labels] == classes) == (count <= 40)


def test_attention_is_drawn_by_head_and_in_the_mean(drawn):
    attention = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.1, 0.4]])
    picture, by_head, mean, _ = drawn(plots.draw_attention, torch.rand(4, 5, 3).numpy(), attention, "a cat").axes
    assert picture.images[0].get_array().shape == (4, 5, 3)
    assert_allclose(by_head.images[0].get_array(), attention)
    assert tuple(by_head.images[0].get_extent()) == (0.5, 3.5, 2.5, 0.5)
    assert [bar.get_x() + bar.get_width() / 2 for bar in mean.patches] == [1, 2, 3]
    assert_allclose([bar.get_height() for bar in mean.patches], attention.mean(0))
    assert mean.get_ylim()[0] == by_head.images[0].get_clim()[0] == 0
    assert picture.get_figure().get_suptitle() == "a cat"
    assert [names(axes) for axes in (by_head, mean)] == [
        ("attention to the layers' class tokens", "layer", "head"),
        ("mean over the heads", "layer", ""),
    ]
