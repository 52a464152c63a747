"""Modules of a frozen model: what is prepared for them, and when they are computed of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from .autocast import autocast_dtype
from .calls import is_eager, unsupported_reason
from .intact import Intact

__all__ = ["Prepacked", "is_freezable", "is_frozen_call", "prepack_module"]


class Prepacked:
    """Base that a frozen class puts before its fused class, ``class FrozenX(Prepacked, FusedX)``.

    ``_prepacked``, which the static ``freeze`` makes of the module's tensors, belongs to this processor: it is not
    pickled but made again where the module is loaded.

    Attributes:
        _intact: tells whether the module is what it was made of.
    """

    _prepacked: Any
    _intact: Intact

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_prepacked", "_intact")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        frozen_class = type(self)
        self.__class__ = frozen_class.__bases__[-1]
        frozen_class.freeze(self)


def prepack_module(frozen_class: type[Prepacked], module: Any, made: Any) -> None:
    """Give a module its frozen class, and what was prepared of it."""
    intact = Intact(list(module.modules()))
    module.__dict__.update(_prepacked=made, _intact=intact)
    intact.remember()
    module.__class__ = frozen_class


def is_freezable(operator: str, module: Any, weight: Tensor | None) -> bool:
    """Whether compiled code on the CPU serves a fused module in evaluation mode."""
    if weight is None or weight.device.type != "cpu":
        return False
    if module.plain_reason() is not None or unsupported_reason(*module.buffers()) is not None:
        return False
    with torch.no_grad():
        return backends.choose(operator, weight, weight.dtype).backend == "native"


def is_frozen_call(operator: str, module: Any, x: Tensor, weight: Tensor) -> bool:
    """Whether a call may read what was prepared: it is eager, and computes in the dtype of the weights."""
    return (
        x.dtype == weight.dtype
        and x.device == weight.device
        and not torch.is_grad_enabled()
        and is_eager(x)
        and unsupported_reason(x) is None
        and autocast_dtype(x) is None
        and module.plain_reason() is None
        and module._intact.holds()
        and backends.choose(operator, x, x.dtype).backend == "native"
    )
