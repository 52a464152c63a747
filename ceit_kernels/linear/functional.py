"""A linear layer as a function of its tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..common.autocast import autocast_dtype
from .op import linear_operator

__all__ = ["linear_layer"]

# Multiply-adds of a matmul below which PyTorch's own is as fast, for its calls cost less.
_FEW = 2 << 20


def linear_layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``, its arguments checked.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N).

    Raises:
        BackendError: the backend that was asked for cannot serve the call.
    """
    # In a graph the number of rows may be any.
    few = not torch.compiler.is_compiling() and x.numel() * weight.shape[0] < _FEW
    if few and backends.current_backend("linear") == "auto":
        return F.linear(x, weight, bias)
    compute_dtype = autocast_dtype(x)
    backend = backends.choose("linear", x, compute_dtype or x.dtype).backend
    if backend == "reference":
        return F.linear(x, weight, bias)
    return linear_operator(x, weight, bias, compute_dtype, backend)
