"""What the compiled calls of many layers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import backends
from ..add_norm.module import is_plain_layer_norm
from ..common.autocast import autocast_dtype
from ..common.calls import is_eager, unsupported_reason
from ..common.children import child_reason
from ..linear.module import LINEAR

__all__ = ["CallArguments", "are_readable", "attention_tensors", "can_run_fused", "is_idle", "linear_tensors"]

_DROPOUT = (nn.Dropout, nn.Identity)


class CallArguments(NamedTuple):
    """What a compiled call takes of modules beside tokens, as csrc/cpu/block has it."""

    parameters: list[Tensor | None]
    scalars: list[float]
    sizes: list[int]


def can_run_fused(x: Tensor, dims: int, operators: Sequence[str], autocast: torch.dtype | None = None) -> bool:
    """Whether one call may stand for several operators on a tensor x of so many dimensions.

    It may where no gradient is wanted, no hook or transform is active, autocast is off or in ``autocast``, and
    every operator would run natively.
    """
    return (
        x.dim() == dims
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and is_eager(x)
        and unsupported_reason(x) is None
        and autocast_dtype(x) is autocast
        and not _has_any_global_hook()
        and all(backends.choose(name, x, autocast or x.dtype).backend == "native" for name in operators)
    )


def is_idle(dropout: nn.Module) -> bool:
    """Whether a dropout may be left out at inference."""
    return child_reason("dropout", dropout, _DROPOUT) is None and not (dropout.training and getattr(dropout, "p", 1.0))


def linear_tensors(layer: nn.Module, out_features: int, in_features: int) -> list[Tensor | None] | None:
    """Weight and bias of a linear layer; None where it has to be called."""
    if child_reason("layer", layer, LINEAR) is not None or layer.weight.shape != (out_features, in_features):
        return None
    return [layer.weight, layer.bias]


def attention_tensors(
    norm1: nn.Module, attention: nn.Module, norm2: nn.Module, kind: type[nn.Module], channels: int
) -> tuple[list[Tensor | None], list[float]] | None:
    """The parameters of norm, attention and norm, and eps, factor of the scores and eps; None where one is called.

    Weights and biases in the order of the calls: norm1, qkv, proj, norm2. Attention is taken of one kind alone, for all
    kinds have parameters of the same names.
    """
    if child_reason("attention", attention, (kind,)) is not None:
        return None
    if attention.plain_reason() is not None or not is_idle(attention.proj_drop):
        return None
    if not (is_plain_layer_norm(norm1) and is_plain_layer_norm(norm2)):
        return None
    qkv = linear_tensors(attention.qkv, 3 * channels, channels)
    proj = linear_tensors(attention.proj, channels, channels)
    if qkv is None or proj is None:
        return None
    tensors = [norm1.weight, norm1.bias, *qkv, *proj, norm2.weight, norm2.bias]
    return tensors, [norm1.eps, attention.scale, norm2.eps]


def are_readable(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Whether compiled code may read parameters beside x: on its device, of its dtype but for vectors in float32."""
    for tensor in tensors:
        if tensor is None:
            continue
        alike = tensor.dtype == x.dtype or (tensor.dtype == torch.float32 and tensor.dim() <= 1)
        if not alike or tensor.device != x.device:
            return False
    return unsupported_reason(x, *tensors) is None
