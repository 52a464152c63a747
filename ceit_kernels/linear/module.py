"""The module that a user drops in for a linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..common.autocast import autocast_dtype
from ..common.checks import check_input
from ..common.module import adopt
from . import op  # noqa: F401, which registers the operator

__all__ = ["FusedLinear"]


class FusedLinear(nn.Linear):
    """A linear layer, at inference by oneDNN on the CPU, which keeps a packed copy of the weight beside it.

    Constructor, parameters and state_dict are those of ``torch.nn.Linear``.
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
        check_input("x", x, self.weight, "weight", *x.shape[:-1], self.in_features)
        dtype = autocast_dtype(x)
        differentiable = any(t is not None and t.requires_grad for t in (x, self.weight, self.bias))
        phase = "training" if differentiable and torch.is_grad_enabled() else "inference"
        choice = backends.choose("linear", x, dtype or x.dtype, phase=phase)
        if choice.backend == "reference":
            return F.linear(x, self.weight, self.bias)
        return torch.ops.ceit.linear(x, self.weight, self.bias, not self.training, None, choice.backend)
