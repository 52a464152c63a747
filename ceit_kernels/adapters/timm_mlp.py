"""The feed-forward blocks of timm's vision transformers: at inference on the CPU the activation ends the first GEMM."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, jit, nn

from .. import backends
from ..common.autocast import autocast_dtype
from ..common.calls import is_eager, needs_gradient, unsupported_reason
from ..common.children import ANY, children_reason
from ..common.matmul import linear_activation
from ..common.module import Fusion, attributes_of
from ..leff.activations import INDICES, MODULES, activation_name
from ..linear.module import FusedLinear

__all__ = ["Mlp", "NormMlp"]

_LIVE = nn.Linear, FusedLinear  # a frozen layer has a prepacked weight
# Multiply-adds of the first layer below which PyTorch's own calls are as fast.
_FEW = 2 << 20


class Mlp(Fusion, attributes_of(nn.Module)):
    """``timm.layers.mlp.Mlp``. Reads its first layer and its activation, and calls the other children.

    Attributes:
        before, behind: the children that are called ahead of these two and after them.
    """

    calls_children = True
    before: ClassVar[tuple[str, ...]] = ()
    behind: ClassVar[tuple[str, ...]] = ("drop1", "norm", "fc2", "drop2")

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., C) -> (..., O)."""
        if jit.is_scripting():
            return self._plain_forward(x)
        return self._fused_forward(x)

    @jit.unused
    def _fused_forward(self, x: Tensor) -> Tensor:
        if self.plain_reason() is not None or not self._serves(x):
            return super().forward(x)
        children: Any = self._modules
        for name in self.before:
            x = children[name](x)
        layer, act = children["fc1"], children["act"]
        if _is_plain_rows(x, layer.weight, layer.bias):
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            index = INDICES[str(activation_name(act))]
            x = linear_activation(rows, layer.weight, layer.bias, index).view(*x.shape[:-1], -1)
        else:
            x = act(layer(x))
        for name in self.behind:
            x = children[name](x)
        return x

    def _serves(self, x: Tensor) -> bool:
        eager = unsupported_reason(x) is None and is_eager(x) and autocast_dtype(x) is None
        return eager and x.is_cpu and backends.choose("linear", x, x.dtype).backend == "native"

    def plain_reason(self) -> str | None:
        """As of ``Fusion``."""
        called = dict.fromkeys((*self.before, *self.behind), ANY)
        reason = children_reason(self, {**called, "fc1": _LIVE, "act": MODULES})
        if reason is None and activation_name(self.get_submodule("act")) is None:
            reason = "the kernels do not know what act computes"
        return reason


class NormMlp(Mlp):
    """``timm.models.tiny_vit.NormMlp``."""

    before, behind = ("norm",), ("drop1", "fc2", "drop2")


def _is_plain_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel computes a linear layer without gradients, and not slower than PyTorch."""
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if needs_gradient(*given) or not all(map(is_eager, given)) or unsupported_reason(*given) is not None:
        return False
    same = all((tensor.dtype, tensor.device) == (x.dtype, x.device) for tensor in given)
    return same and x.shape[-1:] == weight.shape[1:] and x.numel() * weight.shape[0] >= _FEW
