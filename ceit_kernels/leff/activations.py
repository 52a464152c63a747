"""The activations of LeFF: their names, functions and modules. Compiled code knows them by their indices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ..common.children import qualified_name

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
_NAMES: dict[type[nn.Module] | str, str] = {
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.Identity: "identity",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
}
MODULES = (nn.GELU, *_NAMES)


def activation_name(module: nn.Module) -> str | None:
    """The name of an activation that is one of ``MODULES``; None where its function is another than its class's."""
    kind = type(module)
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if kind is nn.ReLU6 and (module.min_val, module.max_val) != (0.0, 6.0):  # which clamps between any two
        return None
    name = _NAMES.get(kind) or _NAMES.get(qualified_name(kind))
    act = module.__dict__.get("act", F.gelu)
    if act is F.gelu:
        return name
    keywords = {"approximate": "tanh"} if name == "gelu_tanh" else {}
    return name if isinstance(act, partial) and act.func is F.gelu and act.keywords == keywords else None
