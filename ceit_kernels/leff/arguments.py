"""What LeFF's registered operators take, and the checks of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.checks import check_device, check_dtype, check_floating, check_shape
from .activations import ACTIVATIONS
from .grid import token_grid

__all__ = [
    "NORM_MODES",
    "NORM_TENSORS",
    "PARAMETER_NAMES",
    "PARAMETER_SCHEMA",
    "SAVED_NAMES",
    "SHAPED",
    "Settings",
    "check",
    "check_call",
    "check_weights",
    "convolutions",
    "kernel_size_unsupported_reason",
    "out_dtype",
    "parameters_per_layer",
    "settings_of",
]

_KERNEL_SIZES = (3, 5, 7)
NORM_MODES = ("none", "frozen", "batch")

# weight and bias of the convolution; weight, bias, running mean and running variance of its norm
parameters_per_layer = 6
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
# One argument each: the gradients of a list with None in it would be lost in silence.
PARAMETER_NAMES = tuple(
    f"{name}{layer}"
    for layer in (1, 2, 3)
    for name in ("weight", "bias", "norm_weight", "norm_bias", "running_mean", "running_var")
)
# What forward keeps for backward, behind its result.
SAVED_NAMES = ("z1", "z2", "z3", "norm1", "norm2", "norm3", "count")
# Places among x and the parameters of those whose shapes, once they are checked, say those of the others.
SHAPED = (0, *range(1, 1 + len(PARAMETER_NAMES), parameters_per_layer))
PARAMETER_SCHEMA = ", ".join(f"Tensor{'' if name.startswith('weight') else '?'} {name}" for name in PARAMETER_NAMES)


class Settings(NamedTuple):
    """What a call computes beside its tensors.

    Attributes:
        eps: of each norm.
        norms: of each layer "none", "frozen" (running statistics) or "batch" (this batch's).
        height: H.
        width: W.
        num_prefix_tokens: P.
        activations: names, after the first and the second layer.
        group: name of the process group whose batches are one for the statistics; None for this process alone.
        compute_dtype: of the GEMMs, by default the dtype of x.
        backend: which implementation.
    """

    eps: Sequence[float]
    norms: Sequence[str]
    height: int
    width: int
    num_prefix_tokens: int
    activations: Sequence[str]
    group: str | None
    compute_dtype: torch.dtype | None
    backend: str = ""


def settings_of(*fields: Any) -> Settings:
    """Settings whose fields may be lists; they are hashable."""
    hashable: list[Any] = [tuple(field) if isinstance(field, list) else field for field in fields]
    return Settings(*hashable)


def check(x: Tensor, parameters: Sequence[Tensor | None], residual: Tensor | None, settings: Settings) -> None:
    """Check the arguments of a registered operator."""
    for name, given in (("eps", settings.eps), ("norms", settings.norms)):
        if len(given) != 3:
            raise ValueError(f"{name}: expected one for each of 3 layers, got {len(given)}")
    check_weights(parameters[::parameters_per_layer], PARAMETER_NAMES[::parameters_per_layer])
    check_call(x, parameters, residual, settings, PARAMETER_NAMES)
    token_grid(x.shape[1], settings.num_prefix_tokens, (settings.height, settings.width))


def check_call(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    residual: Tensor | None,
    settings: Settings,
    names: Sequence[str],
) -> None:
    """Check all arguments of a call but the shapes of the weights and the grid.

    Args:
        x: tokens (B, P + H * W, C).
        parameters: the tensors of ``PARAMETER_NAMES``.
        residual: (B, P + H * W, O).
        settings: of the call.
        names: of the parameters in messages.
    """
    if len(settings.activations) != 2:
        raise ValueError(f"activations: expected 2, got {len(settings.activations)}")
    for name in settings.activations:
        if name not in ACTIVATIONS:
            raise ValueError(f"activations: expected of {tuple(ACTIVATIONS)}, got {name!r}")
    weight1 = parameters[0]
    check_shape("x", x, "B", "N", weight1.shape[1])
    check_floating("x", x)
    check_device("x", x, weight1, names[0])
    if settings.compute_dtype is None:
        check_dtype("x", x, weight1.dtype, names[0])
    dtype, device = x.dtype, x.device
    for layer, mode in enumerate(settings.norms):
        if mode not in NORM_MODES:
            raise ValueError(f"norms: expected of {NORM_MODES}, got {mode!r}")
        first = layer * parameters_per_layer
        channels = parameters[first].shape[:1]
        for i in range(first, first + parameters_per_layer):
            tensor = parameters[i]
            # What a parameter mostly is, which is quicker to tell than what is wrong with another.
            if tensor is not None and not (
                tensor.dtype is dtype and tensor.device == device and (i == first or tensor.shape == channels)
            ):
                _check_parameter(names[i], tensor, i - first, channels[0], x, settings.compute_dtype)
            if mode == "none" and tensor is not None and i > first + 1:
                raise ValueError(f"{names[i]}: expected None where the layer has no norm, got a tensor")
        if (parameters[first + 4] is None) != (parameters[first + 5] is None):
            name = names[first + (4 if parameters[first + 4] is None else 5)]
            raise ValueError(f"{name}: expected both running statistics or none, got one")
    out_features = parameters[2 * parameters_per_layer].shape[0]
    if settings.num_prefix_tokens and out_features != x.shape[2]:
        name = names[2 * parameters_per_layer]
        raise ValueError(f"{name}: expected {x.shape[2]} outputs, which prefix tokens keep, got {out_features}")
    if residual is not None:
        check_shape("residual", residual, x.shape[0], x.shape[1], out_features)
        check_floating("residual", residual)
        check_device("residual", residual, x, "x")
    if "batch" in settings.norms and settings.group is None and x.shape[0] * settings.height * settings.width == 1:
        # As torch.nn.functional.batch_norm puts it.
        size = torch.Size((1, parameters[0].shape[0], 1, 1))
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")


def check_weights(weights: Sequence[Tensor], names: Sequence[str]) -> None:
    """Check the shapes of the three weights among each other; pointwise ones may be those of linear layers."""
    weight1, weight2, weight3 = weights
    check_shape(names[0], weight1, "E", "C", *_pixel(weight1))
    hidden = weight1.shape[0]
    check_shape(names[1], weight2, hidden, 1, "k", "k")
    check_shape(names[2], weight3, "O", hidden, *_pixel(weight3))
    height, width = weight2.shape[2:]
    if height != width or height % 2 == 0:
        raise ValueError(f"{names[1]}: expected a square kernel of an odd side, got {height} * {width}")
    for name, weight in zip(names, weights, strict=True):
        if weight.numel() == 0:
            raise ValueError(f"{name}: expected at least one channel, got shape {tuple(weight.shape)}")


def _pixel(weight: Tensor) -> tuple[int, ...]:
    """What the shape of a pointwise weight has behind its channels."""
    return () if weight.dim() == 2 else (1, 1)


def _check_parameter(
    name: str, tensor: Tensor, place: int, channels: int, x: Tensor, compute_dtype: torch.dtype | None
) -> None:
    """Check a parameter, by its place among those of its layer."""
    if place > 0:
        check_shape(name, tensor, channels)
    if place > 1:
        check_floating(name, tensor)
    elif compute_dtype is None:
        check_dtype(name, tensor, x.dtype, "x")
    check_device(name, tensor, x, "x")


def out_dtype(x: Tensor, residual: Tensor | None, settings: Settings) -> torch.dtype:
    """As concatenating the prefix tokens with the convolutions' result, and adding the residual, have it."""
    dtype = settings.compute_dtype or x.dtype
    if settings.num_prefix_tokens and dtype is not x.dtype:
        dtype = torch.promote_types(x.dtype, dtype)
    return dtype if residual is None else torch.promote_types(dtype, residual.dtype)


def kernel_size_unsupported_reason(weight2: Tensor) -> str | None:
    """Why the kernels cannot take a depthwise weight (E, 1, k, k); None if they can."""
    side = weight2.shape[-1]
    return None if side in _KERNEL_SIZES else f"the kernels take depthwise kernels of side {_KERNEL_SIZES}, not {side}"


def convolutions(x: Sequence[int], parameters: Sequence, height: int, width: int) -> list[tuple[tuple[int, ...], ...]]:
    """Shapes of input, weight and result of the three convolutions, from those of a call's tensors."""
    weights = [(*weight, 1, 1)[:4] for weight in parameters[::parameters_per_layer]]
    channels = [x[2], *(weight[0] for weight in weights)]
    images = [(x[0], count, height, width) for count in channels]
    return list(zip(images[:-1], weights, images[1:], strict=True))
