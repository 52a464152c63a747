"""The list of operators: what implements each, and the modules that call it. All that goes over operators reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch

__all__ = ["OPERATORS", "Implementation", "OperatorSpec"]


class Implementation(NamedTuple):
    """An operator's code for one kind of device.

    Attributes:
        dtypes: what it computes in.
        compiled: an operator of the extension, without which the code is not there; None for what needs none.
    """

    dtypes: tuple[torch.dtype, ...]
    compiled: str | None = None


@dataclass(frozen=True)
class OperatorSpec:
    """An operator.

    Attributes:
        name: of its folder, of ``ceit::<name>``, for ``use_backend`` and of the flag of ``fuse``.
        implementations: by backend, the fastest first, then by device; beside the reference, which runs anywhere.
        fused: the fused modules, each of which knows its plain class.
        frozen: the frozen module, if there is one.
    """

    name: str
    implementations: Mapping[str, dict[str, Implementation]]
    fused: tuple[str, ...]
    frozen: str | None = None

    def fused_classes(self) -> tuple[Any, ...]:
        """The classes of ``fused``."""
        return tuple(map(_resolve, self.fused))

    def frozen_class(self) -> Any:
        """The class of ``frozen``, or None."""
        return self.frozen and _resolve(self.frozen)


def _resolve(name: str) -> Any:
    return resolve_name(f"{__package__}.{name}")


_TRITON = {"cuda": Implementation((torch.float32, torch.float16, torch.bfloat16, torch.float64))}


def _cpu(compiled: str | None = None) -> dict[str, Implementation]:
    return {"cpu": Implementation((torch.float32, torch.bfloat16, torch.float64), compiled)}


_SPECS = (
    OperatorSpec(
        "leff",
        {"triton": _TRITON, "library": _TRITON, "native": _cpu("_leff_train")},
        ("leff:FusedLeFF",),
        frozen="leff:FrozenLeFF",
    ),
    OperatorSpec("lca", {"triton": _TRITON, "native": _cpu()}, ("lca:FusedLCAAttention",)),
    OperatorSpec(
        "i2t",
        {
            "native": {
                "cuda": Implementation((torch.float32, torch.float16, torch.bfloat16), "_i2t_forward"),
                **_cpu("_i2t_forward_cpu"),
            }
        },
        ("i2t:FusedImage2Tokens",),
    ),
    OperatorSpec("add_norm", {"triton": _TRITON, "native": _cpu("_add_norm_forward")}, ("add_norm:FusedAddNorm",)),
    OperatorSpec(
        "linear",
        {"native": _cpu("_linear")},
        ("linear:FusedLinear", "linear:FusedPatchProjection"),
        frozen="linear:FrozenLinear",
    ),
    OperatorSpec("attention", {"triton": _TRITON, "native": _cpu("_attention")}, ("attention:FusedAttention",)),
)
OPERATORS: dict[str, OperatorSpec] = {spec.name: spec for spec in _SPECS}
