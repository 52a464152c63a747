"""When a module of a frozen model is computed of what was prepared for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends
from .autocast import autocast_dtype
from .calls import is_eager, unsupported_reason
from .module import Fusion

__all__ = ["is_freezable", "is_frozen_call"]


def is_freezable(operator: str, module: nn.Module, fused_class: type[Fusion], weight: Tensor | None) -> bool:
    """Whether compiled code on the CPU serves a module that is exactly of a fused class and in evaluation mode."""
    if type(module) is not fused_class or weight is None or weight.device.type != "cpu":
        return False
    if module.plain_reason() is not None or unsupported_reason(weight) is not None:
        return False
    with torch.no_grad():
        return backends.choose(operator, weight, weight.dtype).backend == "native"


def is_frozen_call(operator: str, module: Fusion, x: Tensor, weight: Tensor) -> bool:
    """Whether a call may read what was prepared: nobody watches, and it computes in the dtype of the weights."""
    return (
        x.dtype == weight.dtype
        and x.device == weight.device
        and not torch.is_grad_enabled()
        and is_eager(x)
        and unsupported_reason(x) is None
        and autocast_dtype(x) is None
        and module.plain_reason() is None
        and backends.choose(operator, x, x.dtype).backend == "native"
    )
