"""The model that a run's options describe."""

from typing import Any

from torch import nn

from ..registry import create_model
from .options import RunOptions, UsageError, usage_errors


def build_model(options: RunOptions, **kwargs: Any) -> nn.Module:
    """Create the model that the options describe.

    Args:
        options: options with `num_classes` filled in.
        **kwargs: further arguments of the model; `options.model_kwargs` go before them.

    Raises:
        UsageError: unknown model, or arguments that it does not take.
    """
    kwargs = {**kwargs, **options.model_kwargs}
    if kwargs.get("in_chans", 3) != 3:
        raise UsageError(f"--model-kwargs in_chans={kwargs['in_chans']}: images are read as RGB, expected 3")
    for name in ("img_size", "num_classes"):
        if name in kwargs:
            raise UsageError(f"--model-kwargs {name}={kwargs[name]}: give it as --{name.replace('_', '-')}")
    if options.img_size is not None:
        kwargs["img_size"] = options.img_size
    with usage_errors(f"--model {options.model}"):
        return create_model(options.model, fused=options.fused, num_classes=options.num_classes, **kwargs)


def number_of_classes(options: RunOptions, classes: tuple[str, ...]) -> int:
    """The size of the model's head: as given, or one output for each of the data's classes.

    Raises:
        UsageError: the data has more classes than outputs were asked for.
    """
    if options.num_classes is not None and options.num_classes < len(classes):
        raise UsageError(f"--num-classes {options.num_classes}: expected at least {len(classes)}, the data's classes")
    return options.num_classes or len(classes)
