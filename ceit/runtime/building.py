"""The model that a run's options and its checkpoint describe."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from ..checkpoint import load_checkpoint, number_of_outputs
from ..registry import create_model, is_model_folder
from .checkpoints import load_checkpoint_state
from .errors import UsageError, usage_errors
from .fields import flag
from .options import EvaluateOptions, ExportOptions, ModelOptions, PredictOptions

_Options = TypeVar("_Options", EvaluateOptions, PredictOptions, ExportOptions)


def build_model(options: ModelOptions, **kwargs: Any) -> nn.Module:
    """Create the model that the options describe.

    Args:
        options: options with `num_classes` filled in, unless `model` is a folder.
        **kwargs: further arguments of the model; `options.model_kwargs` go before them.

    Raises:
        UsageError: unknown model, or arguments that it does not take.
    """
    kwargs = {**kwargs, **options.model_kwargs}
    if kwargs.get("in_chans", 3) != 3:
        raise UsageError(f"--model-kwargs in_chans={kwargs['in_chans']}: images are read as RGB, expected 3")
    for name in ("img_size", "num_classes", "checkpoint", "fused"):
        if name in kwargs:
            raise UsageError(f"--model-kwargs {name}={kwargs[name]}: give it as {flag(name)}")
    if "features_only" in kwargs or kwargs.get("global_pool") == "":
        raise UsageError("--model-kwargs features_only and global_pool='': expected a model that classifies images")
    for name in ("img_size", "num_classes"):
        if getattr(options, name) is not None:
            kwargs[name] = getattr(options, name)
    if "img_size" in kwargs:
        kwargs["img_size"] = image_size(options)
    with usage_errors(f"--model {options.model}"):
        return create_model(options.model, fused=options.fused, **kwargs)


def image_size(options: ModelOptions) -> tuple[int, int] | None:
    """Height and width that `--img-size` gives, None where it is the model's own.

    Raises:
        UsageError: neither one number nor two.
    """
    size = options.img_size
    if size is None:
        return None
    sides = [size] if isinstance(size, int) else list(size)
    if len(sides) > 2:
        raise UsageError(f"--img-size must be one number or two, got {len(sides)}")
    return sides[0], sides[-1]


def input_arguments(options: ModelOptions) -> dict[str, Any]:
    """What `timm.data.resolve_model_data_config` is to know of the options: the size of the images."""
    size = image_size(options)
    return {} if size is None else {"input_size": (3, *size)}


def restore_model(options: _Options) -> tuple[nn.Module, _Options, tuple[str, ...] | None]:
    """Create the model of a checkpoint, or of a folder in timm's hub layout, and load its weights.

    Returns:
        The model on the CPU; the options with what the checkpoint records filled in; and the names of the classes, None
        where nothing records them.

    Raises:
        UsageError: the checkpoint cannot be used, or does not say which model it is of.
    """
    if options.model is not None and is_model_folder(options.model):
        if options.checkpoint is not None or options.ema:
            raise UsageError("--checkpoint and --ema: a folder as --model brings its own weights")
        model: Any = build_model(options)
        options = dataclasses.replace(options, num_classes=model.num_classes)
        labels = model.pretrained_cfg.get("label_names")
        return model, options, None if labels is None else tuple(labels)
    checkpoint = options.checkpoint
    if checkpoint is None:
        raise UsageError("--checkpoint must be given, unless --model is a folder")
    options, classes = _with_recorded_options(options, checkpoint)
    if options.num_classes is None:
        with usage_errors("--checkpoint"):
            options = dataclasses.replace(options, num_classes=number_of_outputs(checkpoint, use_ema=options.ema) or 0)
    model = build_model(options)
    with usage_errors("--checkpoint"):
        load_checkpoint(model, checkpoint, use_ema=options.ema)
    return model, options, classes


def _with_recorded_options(options: _Options, checkpoint: str) -> tuple[_Options, tuple[str, ...] | None]:
    """The options completed from a checkpoint of `ceit train`, and its classes; None for another's checkpoint."""
    if options.model is not None:
        return options, None
    try:
        state = load_checkpoint_state(checkpoint)
    except UsageError as error:
        raise UsageError(f"{error}; for another's checkpoint give --model") from error
    recorded: Mapping[str, Any] = state["options"]
    names = ("model", "num_classes", "img_size", "crop_pct")
    completed = {name: getattr(options, name) or recorded.get(name) for name in names if hasattr(options, name)}
    model_kwargs = {**recorded.get("model_kwargs", {}), **options.model_kwargs}
    return dataclasses.replace(options, **completed, model_kwargs=model_kwargs), tuple(state["classes"])


def number_of_classes(options: ModelOptions, classes: tuple[str, ...]) -> int:
    """The size of the model's head: as given, or one output for each of the data's classes.

    Raises:
        UsageError: the data has more classes than outputs were asked for, or does not say which it has.
    """
    if options.num_classes is None and not classes:
        raise UsageError("--num-classes must be given: the images come without the names of their classes")
    if options.num_classes is not None and options.num_classes < len(classes):
        raise UsageError(f"--num-classes {options.num_classes}: expected at least {len(classes)}, the data's classes")
    return options.num_classes or len(classes)


def numbered_classes(options: ModelOptions) -> list[str]:
    """Names for the outputs of a model whose classes have none."""
    return [str(number) for number in range(options.num_classes or 0)]
