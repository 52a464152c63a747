"""Accuracy of a model on test images."""

import dataclasses
import logging
from collections.abc import Iterable

import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F

from ceit_kernels import freeze

from .checkpoint import load_checkpoint
from .data import check_classes, create_test_loader, open_split, resolve_data_options
from .runtime.building import build_model, number_of_classes
from .runtime.checkpoints import load_checkpoint_state
from .runtime.distributed import Place, processes
from .runtime.machine import AMP_DTYPES, autocast, backend, fused_operators
from .runtime.options import EvaluateOptions, UsageError, check, usage_errors
from .runtime.progress import progress_bar

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Means over `images` test images: cross entropy in nats, accuracies in percent."""

    loss: float
    top1: float
    top5: float
    images: int


def evaluate(model: nn.Module, loader: Iterable, place: Place, amp: str = "none") -> Metrics:
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
    # To give every process as many, the sampler repeats images at the end of some processes' shares.
    left = len(range(place.rank, len(loader.dataset), place.world_size))
    totals, count = torch.zeros(3, dtype=torch.float64, device=place.device), left
    with progress_bar(left, "testing", place.primary) as bar, torch.no_grad(), autocast(place.device, amp):
        for images, targets in loader:
            images, targets = images[:left], targets[:left]
            if not len(images):
                break
            left -= len(images)
            logits = model(images).float()
            ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            loss = F.cross_entropy(logits, targets, reduction="sum")
            totals += torch.stack([loss, ranked[:, 0].sum(), ranked.sum()])
            bar.update(len(images))
    loss, top1, top5, count = place.sum([*totals.tolist(), count])
    return Metrics(loss / count, 100 * top1 / count, 100 * top5 / count, int(count))


def evaluate_checkpoint(options: EvaluateOptions) -> Metrics:
    """Evaluate a checkpoint on the test split of `options.data`.

    For a checkpoint of `ceit train` the model, its arguments, the image size and the names of the classes are the
    recorded ones; for another, `options.model` is needed. A fused model is frozen, for its weights do not change any
    more; a plain one runs as it is.

    Raises:
        UsageError: an option, the data or the checkpoint cannot be used.
    """
    check(options)
    options, classes = _with_recorded_options(options)
    options = resolve_data_options(options)
    with processes(options.device) as place, backend(options.backend):
        split = open_split(options.data, training=False)
        if classes is not None:
            check_classes(classes, split.classes, "the checkpoint and the test images")
        options = dataclasses.replace(options, num_classes=number_of_classes(options, split.classes))
        model = build_model(options)
        with usage_errors("--checkpoint"):
            load_checkpoint(model, options.checkpoint, use_ema=options.ema)
        model = model.to(place.device)
        operators = fused_operators(model, place.device, AMP_DTYPES[options.amp])
        _logger.info("fused operators: %s", {name: by["backend"] for name, by in operators.items()} or "none")
        config = resolve_model_data_config(model, args={"img_size": options.img_size})
        if operators:
            model = freeze(model)
        return evaluate(model, create_test_loader(split, options, config, place), place, options.amp)


def _with_recorded_options(options: EvaluateOptions) -> tuple[EvaluateOptions, tuple[str, ...] | None]:
    """The options completed from a checkpoint of `ceit train`, and its classes; None for another's checkpoint."""
    if options.model is not None:
        return options, None
    try:
        state = load_checkpoint_state(options.checkpoint)
    except UsageError as error:
        raise UsageError(f"{error}; for another's checkpoint give --model") from error
    recorded = state["options"]
    completed = {
        name: getattr(options, name) or recorded[name] for name in ("model", "num_classes", "img_size", "crop_pct")
    }
    model_kwargs = {**recorded["model_kwargs"], **options.model_kwargs}
    return dataclasses.replace(options, **completed, model_kwargs=model_kwargs), tuple(state["classes"])
