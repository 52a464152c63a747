"""The module that a user drops in for a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends
from ..common.calls import foreign_reason, unsupported_reason
from ..common.checks import check_input
from ..common.children import children_reason
from ..common.freezing import Prepacked, is_freezable, is_frozen_call, prepack_module
from ..common.matmul import linear, prepack_linear
from ..common.module import Fusion, attributes_of
from .functional import linear_layer

__all__ = ["LINEAR", "FrozenLinear", "FusedLinear", "LinearFusion"]


class LinearFusion(Fusion, attributes_of(nn.Linear)):
    """``forward`` of a linear layer, by our own GEMM on the CPU. Differentiable once, by the reference more often."""

    def forward(self, input: Tensor) -> Tensor:
        """``input W^T + b`` for an input (..., in_features); (..., out_features).

        Raises:
            ValueError, TypeError: the input is not of the layer's width, dtype or device.
            BackendError: the backend that was asked for cannot serve the call.
        """
        if torch.jit.is_scripting():
            return self._plain_forward(input)
        return self._fused_forward(input)

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


class FrozenLinear(Prepacked, FusedLinear):
    """A linear layer of a frozen model, with a prepacked copy of its weight. Made by ``freeze`` alone."""

    @staticmethod
    def freeze(module: nn.Module) -> None:
        """Make one of a fused layer whose tensors do not change any more, where that is faster."""
        if type(module) is FusedLinear and is_freezable("linear", module, module._buffers.get("weight")):
            prepack_module(FrozenLinear, module, prepack_linear(module.weight, module.bias))

    def _fused_forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.shape[-1:] != weight.shape[1:] or x.numel() == 0 or not is_frozen_call("linear", self, x, weight):
            return super()._fused_forward(x)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return linear(rows, weight, self.bias, self._prepacked).view(*x.shape[:-1], weight.shape[0])


LINEAR = (nn.Linear, FusedLinear, FrozenLinear)
