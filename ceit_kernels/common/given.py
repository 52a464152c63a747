"""Linear layers whose biases have their gradients from elsewhere, where they are summed in a pass with others.

The gradient of the layer's result is handed over by autograd as that of a tensor without values, a result of the
function that takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear_given"]


class _Projected(torch.autograd.Function):
    """A result as it is, whose gradient goes to `given` too."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, given: Tensor) -> Tensor:
        ctx.mark_dirty(out)  # a view could not be written to in place, as a result can
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads * 2


_projected: Callable[..., Any] = _Projected.apply


def linear_given(x: Tensor, weight: Tensor, bias: Tensor, given: Tensor) -> Tensor:
    """A linear layer of x (B, N, K), whose bias (F,) has its gradient from what `given` (B * N, F) is a result of.

    Returns:
        (B, N, F).
    """
    # In two dimensions, in which what a linear layer returns is no view.
    rows = F.linear(x.flatten(0, 1), weight, bias.detach())
    return _projected(rows, given).unflatten(0, x.shape[:2])
