"""A residual connection with its LayerNorm on the CPU: one compiled pass forward, one backward."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_norm_backward_cpu", "add_norm_forward_cpu"]

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


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What parameters, statistics and sums are kept in."""
    return dtype if dtype == torch.float64 else torch.float32


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
    total_dtype: torch.dtype,
    out_dtype: torch.dtype,
    with_statistics: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Arguments as of ``add_layer_norm``, checked and not empty; ``total_dtype`` is that of the sum.

    Returns:
        ``x + branch`` (None without a branch), its LayerNorm, its prefix tokens (None without any), means and
        reciprocal deviations of the rows (None without statistics).
    """
    wide = _wide(total_dtype)
    weight, bias = _as(weight, wide), _as(bias, wide)
    total = mean = rstd = None
    if with_statistics:
        mean, rstd = x.new_empty(x.shape[:-1], dtype=wide), x.new_empty(x.shape[:-1], dtype=wide)
    if out_dtype == total_dtype:
        x, branch = _as(x, total_dtype), _as(branch, total_dtype)
        total = None if branch is None else torch.empty_like(x)
        out = torch.empty_like(x)
        _forward(x, branch, weight, bias, eps, total, out, mean, rstd)
    else:
        total = None if branch is None else x + branch
        source = _as(x if total is None else total, wide)
        out = torch.empty_like(source)
        _forward(source, None, weight, bias, eps, None, out, mean, rstd)
        out = out.to(out_dtype)
    prefix = (x if total is None else total)[:, :num_prefix_tokens].clone() if num_prefix_tokens else None
    return total, out, prefix, mean, rstd


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
    wide, dtype = mean.dtype, total.dtype
    compute = dtype if grad_out.dtype == dtype else wide
    tensors = [_as(tensor, compute) for tensor in (grad_out, grad_total, grad_prefix, total)]
    grad = torch.empty_like(tensors[3]) if need_input else None
    partial = None
    if need_weight or need_bias:
        partial = total.new_empty(((mean.numel() + _ROWS - 1) // _ROWS, 2, total.shape[-1]), dtype=wide)
    _backward(*tensors, _as(weight, wide), mean, rstd, grad, partial)
    if grad is not None:
        grad = grad.to(dtype)
    if partial is None:
        return grad, None, None
    grad_weight, grad_bias = partial.sum(0)
    # Copied, as views of one tensor would be of a registered operator's results.
    return (
        grad,
        grad_weight.to(weight.dtype, copy=True) if need_weight else None,
        grad_bias.to(bias.dtype, copy=True) if need_bias else None,
    )
