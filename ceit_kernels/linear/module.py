"""The module that a user drops in for a linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..common.autocast import autocast_dtype
from ..common.checks import check_input
from ..common.children import children_reason
from ..common.freezing import is_freezable, is_frozen_call
from ..common.matmul import linear, prepack_linear
from ..common.module import Fusion, attributes_of
from ..common.registration import foreign_reason, is_eager, unsupported_reason
from .op import linear_eagerly

__all__ = ["LINEAR", "FrozenLinear", "FusedLinear", "LinearFusion", "linear_layer"]

# Multiply-adds of a product below which PyTorch's own is as fast, for its calls cost less.
_FEW = 2 << 20


class LinearFusion(Fusion, attributes_of(nn.Linear)):
    """``forward`` of a linear layer, by our own GEMM on the CPU. Differentiable once, by the reference more often."""

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b`` for x (..., in_features); (..., out_features).

        Raises:
            ValueError, TypeError: x is not of the layer's width, dtype or device.
            BackendError: the backend that was asked for cannot serve the call.
        """
        if torch.jit.is_scripting():
            return self._plain_forward(x)
        return self._fused_forward(x)

    @torch.jit.unused
    def _fused_forward(self, x: Tensor) -> Tensor:
        reason = unsupported_reason(x) or self.plain_reason()
        if reason is None:
            weight, bias = self.weight, self.bias
            reason = foreign_reason(weight, bias)
        if reason is not None:
            backends.leave_to_reference("linear", reason)
            return super().forward(x)
        # What an input mostly is, which is quicker to tell than whether it is allowed.
        if x.shape[-1:] != weight.shape[1:] or x.dtype != weight.dtype or x.device != weight.device:
            check_input("x", x, weight, "weight", *x.shape[:-1], weight.shape[1])
        return linear_layer(x, weight, bias)

    def plain_reason(self) -> str | None:
        """As of ``Fusion``."""
        reason = children_reason(self, {}, ("weight", "bias"))
        return "weight is no matrix" if reason is None and self.weight.dim() != 2 else reason


class FusedLinear(LinearFusion, nn.Linear):
    """A linear layer, by this package's GEMM on the CPU.

    Constructor, parameters and state_dict are those of ``torch.nn.Linear``.
    """


class FrozenLinear(FusedLinear):
    """A linear layer of a frozen model, which multiplies with a packed copy of its weight. Made by ``freeze`` alone."""

    @staticmethod
    def freeze(module: nn.Module) -> None:
        """Make one of a fused layer whose tensors do not change any more, where that is faster."""
        if is_freezable("linear", module, FusedLinear, module._buffers.get("weight")):
            module.__class__ = FrozenLinear
            module._pack()

    def _pack(self) -> None:
        self.__dict__["_packed"] = prepack_linear(self.weight, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Wherever it was loaded.
        self.__class__ = FusedLinear
        FrozenLinear.freeze(self)

    def _fused_forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.shape[-1:] != weight.shape[1:] or x.numel() == 0 or not is_frozen_call("linear", self, x, weight):
            return super()._fused_forward(x)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return linear(rows, weight, self.bias, self._packed).view(*x.shape[:-1], weight.shape[0])


LINEAR = (nn.Linear, FusedLinear, FrozenLinear)


def linear_layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``, its arguments checked.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).

    Raises:
        BackendError: the backend that was asked for cannot serve the call.
    """
    # In a graph the number of rows may be any.
    few = not torch.compiler.is_compiling() and x.numel() * weight.shape[0] < _FEW
    if few and backends.current_backend("linear") == "auto":
        return F.linear(x, weight, bias)
    dtype = autocast_dtype(x) or x.dtype
    training = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    backend = backends.choose("linear", x, dtype, phase="training" if training else "inference").backend
    if backend == "reference":
        return F.linear(x, weight, bias)
    if is_eager(x):
        return linear_eagerly(x, weight, bias, dtype, backend, training)
    return torch.ops.ceit.linear(x, weight, bias, None, backend)
