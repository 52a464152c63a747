"""The activations of LeFF: their names, functions and modules. Compiled code knows them by their indices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "INDICES", "MODULES", "activation_name"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "identity": lambda z: z,
}
INDICES = {name: i for i, name in enumerate(ACTIVATIONS)}
_NAMES = {nn.SiLU: "silu", nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.Identity: "identity"}
MODULES = (nn.GELU, *_NAMES)


def activation_name(module: nn.Module) -> str:
    """The name of an activation that is one of ``MODULES``."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _NAMES[type(module)]
