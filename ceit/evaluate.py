"""Accuracy of a model on test images."""

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from .data import check_classes, create_test_loader, open_split, resolve_data_options
from .runtime.building import input_arguments, number_of_classes, numbered_classes, restore_model
from .runtime.distributed import Place, processes
from .runtime.errors import needed, usage_errors
from .runtime.fields import check, plain
from .runtime.files import claimed, write_csv, write_json
from .runtime.machine import AMP_DTYPES, autocast, backend, check_graphs, for_inference, fused_operators
from .runtime.options import EvaluateOptions
from .runtime.progress import progress_bar

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Means over `images` test images: cross entropy in nats, accuracies in percent.

    `confusion` has the number of images by class (row) and by the model's answer (column).
    """

    loss: float
    top1: float
    top5: float
    images: int
    confusion: Tensor = dataclasses.field(repr=False, compare=False)

    def per_class(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Images and accuracy of each class, of those that have images."""
        counts, right = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        return [
            {"class": name, "images": count, "top1": 100 * correct / count}
            for name, count, correct in zip(classes, counts, right, strict=False)
            if count
        ]


def evaluate(model: nn.Module, loader: Any, place: Place, amp: str = "none") -> Metrics:
    """Evaluate a model on every test image exactly once, also with several processes.

    Args:
        model: gives logits (B, num_classes), live or frozen; left in evaluation mode.
        loader: from `ceit.data.create_test_loader`.
        place: this process's device and rank.
        amp: type of mixed precision.

    Returns:
        The metrics over the images of all processes; with fewer than five classes top5 is 100.
    """
    model.eval()
    # To give every process as many, the sampler repeats images at the end of some processes' shares; of images without
    # numbers every process has its own, however many.
    streamed = isinstance(loader.dataset, IterableDataset)
    left = sys.maxsize if streamed else len(range(place.rank, len(loader.dataset), place.world_size))
    loss, top5, confusion = 0.0, 0, torch.zeros((), dtype=torch.int64, device=place.device)
    with (
        progress_bar(None if streamed else left, "testing", place.primary) as bar,
        torch.no_grad(),
        autocast(place.device, amp),
    ):
        for images, targets in loader:
            # All images, of which the repeated ones do not count: with sharded weights processes compute together.
            logits, targets = model(images).float()[:left], targets[:left]
            left -= len(targets)
            ranked = logits.topk(min(5, logits.shape[1])).indices
            loss = loss + F.cross_entropy(logits, targets, reduction="sum").double()
            top5 = top5 + (ranked == targets[:, None]).sum()
            counts = torch.bincount(targets * logits.shape[1] + ranked[:, 0], minlength=logits.shape[1] ** 2)
            confusion = confusion + counts
            bar.update(len(targets))
    loss, top5 = place.sum([float(loss), float(top5)])
    confusion = place.total(confusion).cpu().unflatten(0, (logits.shape[1], -1))
    count = int(confusion.sum())
    return Metrics(loss / count, 100 * int(confusion.trace()) / count, 100 * top5 / count, count, confusion)


def evaluate_checkpoint(options: EvaluateOptions) -> Metrics:
    """Evaluate a checkpoint on the test images of `options.data`.

    For a checkpoint of `ceit train` the model, its arguments, the image size and the names of the classes are the
    recorded ones; for another, `options.model` is needed, and the number of classes is the file's. A fused model is
    frozen, for its weights do not change any more; a plain one runs as it is. With `options.output` the figures, those
    of each class and a picture of the confusions are left there.

    Raises:
        UsageError: an option, the data or the checkpoint cannot be used.
    """
    check(options)
    with processes(options.device) as place, backend(options), contextlib.ExitStack() as stack:
        if options.cuda_graphs:
            check_graphs(place.device)
        model, options, classes = restore_model(options)
        options = resolve_data_options(options)
        split = open_split(options, training=False)
        if classes is not None and split.classes:
            check_classes(classes, split.classes, "the checkpoint and the test images")
        number_of_classes(options, split.classes)
        names = split.classes or classes or numbered_classes(options)
        output = Path(options.output) if options.output is not None and place.primary else None
        if output is not None:
            stack.enter_context(claimed(output))
        model = model.to(place.device)
        operators = fused_operators(model, place.device, AMP_DTYPES[options.amp])
        _logger.info("fused operators: %s", {name: by["backend"] for name, by in operators.items()} or "none")
        config = resolve_model_data_config(model, args=input_arguments(options))
        loader = create_test_loader(split, options, config, place)
        parameters = number_of_parameters(model)
        metrics = evaluate(for_inference(model, operators, options.cuda_graphs), loader, place, options.amp)
        if output is not None:
            _write(metrics, names, {"parameters": parameters, "options": plain(options)}, output)
        return metrics


def number_of_parameters(model: nn.Module) -> int:
    """Parameters of a model, sharded or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def _write(metrics: Metrics, classes: Sequence[str], about: dict[str, Any], output: Path) -> None:
    figures = {name: getattr(metrics, name) for name in ("top1", "top5", "loss", "images")}
    per_class = metrics.per_class(classes)
    with usage_errors(f"--output {output}"):
        write_json(output / "results.json", {**figures, **about, "per_class": per_class})
        write_csv(output / "per_class.csv", per_class)
        with needed("confusion.png", "ceit-kernels[demo]"):
            from .runtime.plots import draw_confusion
        draw_confusion(metrics.confusion, classes, output / "confusion.png")
