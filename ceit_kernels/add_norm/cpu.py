"""A residual connection with its LayerNorm on the CPU: one compiled pass forward, one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import prefix_of

__all__ = ["add_norm_backward_cpu", "add_norm_forward_cpu", "total_dtype"]

torch.library.define(
    "ceit::_add_norm_forward",
    "(Tensor x, Tensor? branch, Tensor? weight, Tensor? bias, float eps, Tensor(a!)? total, Tensor(b!) out, "
    "Tensor(c!)? mean, Tensor(d!)? rstd) -> ()",
)
torch.library.define(
    "ceit::_add_norm_backward",
    "(Tensor grad_out, Tensor? grad_total, Tensor? grad_prefix, Tensor total, Tensor? weight, Tensor mean, "
    "Tensor rstd, Tensor(a!)? grad, Tensor(b!)? partial) -> ()",
)

_forward, _backward = torch.ops.ceit._add_norm_forward.default, torch.ops.ceit._add_norm_backward.default

_ROWS = 32  # that are added up to one partial sum of the parameters' gradients, as in csrc/cpu/add_norm/calls.h


def total_dtype(x: Tensor, branch: Tensor | None) -> torch.dtype:
    """The dtype of ``x + branch``."""
    if branch is None or branch.dtype == x.dtype:
        return x.dtype
    return torch.promote_types(x.dtype, branch.dtype)


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def add_norm_forward_cpu(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    num_prefix_tokens: int,
    need_statistics: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """The results of ``ceit::add_norm``, its arguments checked and not empty."""
    dtype = total_dtype(x, branch)
    acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = _as(weight, acc_dtype), _as(bias, acc_dtype)
    total = mean = rstd = None
    if need_statistics:
        mean, rstd = x.new_empty(x.shape[:-1], dtype=acc_dtype), x.new_empty(x.shape[:-1], dtype=acc_dtype)
    if out_dtype == dtype:
        x, branch = _as(x, dtype), _as(branch, dtype)
        total = None if branch is None else torch.empty_like(x)
        out = torch.empty_like(x)
        _forward(x, branch, weight, bias, eps, total, out, mean, rstd)
    else:
        total = None if branch is None else x + branch
        source = _as(x if total is None else total, acc_dtype)
        out = torch.empty_like(source)
        _forward(source, None, weight, bias, eps, None, out, mean, rstd)
        out = out.to(out_dtype)
    prefix = prefix_of(x if total is None else total, num_prefix_tokens).clone() if num_prefix_tokens else None
    return total, out, prefix, mean, rstd, None


def add_norm_backward_cpu(
    grad_out: Tensor,
    grad_total: Tensor | None,
    grad_prefix: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the sum, the weight and the bias, None for those that are not needed."""
    acc_dtype, dtype = mean.dtype, total.dtype
    compute = dtype if grad_out.dtype == dtype else acc_dtype
    tensors = [_as(tensor, compute) for tensor in (grad_out, grad_total, grad_prefix, total)]
    grad = torch.empty_like(tensors[3]) if need_input else None
    partial = None
    if need_weight or need_bias:
        partial = total.new_empty(((mean.numel() + _ROWS - 1) // _ROWS, 2, total.shape[-1]), dtype=acc_dtype)
    _backward(*tensors, _as(weight, acc_dtype), mean, rstd, grad, partial)
    grad = None if grad is None else grad.to(dtype)
    # Copied, as views of one tensor would be of a registered operator's results.
    sums = (None, None) if partial is None else partial.sum(0)
    grad_weight = sums[0].to(weight.dtype, copy=True) if need_weight else None
    return grad, grad_weight, sums[1].to(bias.dtype, copy=True) if need_bias else None
