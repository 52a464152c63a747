"""The module that a user drops in for a linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..common.autocast import autocast_dtype
from ..common.checks import check_input
from ..common.module import adopt
from ..common.registration import is_plain_call
from .op import linear_eagerly

__all__ = ["FusedLinear", "linear_layer"]


# Multiply-adds of a product below which PyTorch's own is as fast, for its calls cost less.
_FEW = 2 << 20


class FusedLinear(nn.Linear):
    """A linear layer, by oneDNN on the CPU, where at inference a packed copy of the weight is kept beside it.

    Constructor, parameters and state_dict are those of ``torch.nn.Linear``. Differentiable once (any number of times
    by the reference).
    """

    @classmethod
    def from_plain(cls, plain: nn.Module) -> FusedLinear:
        """A fused module over the state of a plain one."""
        return adopt(cls, plain, ("in_features", "out_features", "weight", "bias"), {})

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b`` for x (..., in_features); (..., out_features).

        Raises:
            ValueError, TypeError: x is not of the layer's width, dtype or device.
            BackendError: the backend that was asked for cannot serve the call.
        """
        weight = self.weight
        # What an input mostly is, which is quicker to tell than whether it is allowed.
        if x.shape[-1:] != weight.shape[1:] or x.dtype != weight.dtype or x.device != weight.device:
            check_input("x", x, weight, "weight", *x.shape[:-1], self.in_features)
        return linear_layer(x, weight, self.bias, not self.training)


def linear_layer(x: Tensor, weight: Tensor, bias: Tensor | None, constant: bool) -> Tensor:
    """``x W^T + b``, its arguments checked.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).
        constant: whether the weight is used again before it changes, unless a gradient is wanted.

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
    constant = constant and not training
    if is_plain_call(x):
        return linear_eagerly(x, weight, bias, constant, dtype, backend, training)
    return torch.ops.ceit.linear(x, weight, bias, constant, None, backend)
