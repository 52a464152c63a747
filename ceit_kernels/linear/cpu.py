"""Linear layers on the CPU, by the GEMM of ``csrc/cpu/gemm``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.matmul import linear, matmul, weight_gradient

__all__ = ["linear_backward_cpu", "linear_forward_cpu"]


def _matrix(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def linear_forward_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The result of ``ceit::linear`` in ``dtype``, its arguments checked."""
    matrix = _matrix(x, dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if matrix.numel() == 0:
        return F.linear(x.to(dtype), weight.to(dtype), bias)
    # No view, which a Function must not return for its user to write to.
    return torch.ops.aten._unsafe_view(linear(matrix, weight.to(dtype), bias), [*x.shape[:-1], weight.shape[0]])


def linear_backward_cpu(
    grad_out: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias that are needed, None for the others; arguments checked."""
    gradient = _matrix(grad_out, dtype)
    grad_x = grad_weight = None
    if need_x:
        grad_x = matmul(gradient, weight.to(dtype)) if gradient.numel() else torch.zeros_like(x)
        grad_x = grad_x.view(x.shape).to(x.dtype)
    if need_weight:
        matrix = _matrix(x, dtype)
        empty = matrix.numel() == 0 or gradient.numel() == 0
        grad_weight = torch.zeros_like(weight) if empty else weight_gradient(gradient, matrix).to(weight.dtype)
    return grad_x, grad_weight, gradient.sum(0, dtype=weight.dtype) if need_bias else None
