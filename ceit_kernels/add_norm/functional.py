"""A residual connection and the LayerNorm behind it as a function of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..common.arguments import names_its_arguments
from ..common.calls import needs_gradient, unsupported_reason
from .cpu import total_dtype
from .op import add_norm_operator, layer_norm_dtype
from .reference import add_norm_reference, prefix_of

__all__ = ["add_layer_norm", "add_norm", "add_norm_of_tensors"]


def add_norm(
    x: Tensor,
    branch: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    num_prefix_tokens: int | None = None,
) -> tuple[Tensor, ...]:
    """A residual connection and the LayerNorm behind it: ``total = x + branch`` and ``layer_norm(total)``.

    Use the returned sum, not ``x``, for all that follows: its gradient is then added in the pass that takes the norm's
    gradient. That holds without a branch too, where the sum is ``x``, and for the prefix tokens (class tokens), whose
    gradient would otherwise cost several passes. Differentiable once (any number of times by the reference).

    Args:
        x: (..., C).
        branch: of the shape of x, added to it; nothing if None.
        weight: (C,), or None for ones.
        bias: (C,), or None for zeros.
        eps: added to the variance.
        num_prefix_tokens: return the first tokens of the sum as well, the last if negative, for x of shape (B, N, C).

    Returns:
        The sum (..., C) and its LayerNorm (..., C), with ``num_prefix_tokens`` also these tokens of the sum (B, P, C).
        The LayerNorm has the dtype that ``torch.nn.functional.layer_norm`` gives it, which under autocast on a GPU is
        float32.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is wrong.
        BackendError: the backend that was asked for cannot serve the call.
    """
    unsupported = unsupported_reason(x, branch, weight, bias)
    return add_norm_of_tensors(x, branch, weight, bias, eps, num_prefix_tokens, unsupported)


def add_norm_of_tensors(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    num_prefix_tokens: int | None,
    unsupported: str | None = None,
) -> tuple[Tensor, ...]:
    """``add_norm``, once it is known whether its tensors are of no kind that operators read (``unsupported``)."""
    prefix_tokens = num_prefix_tokens or 0
    dtype, training = total_dtype(x, branch), needs_gradient(x, branch, weight, bias)
    inputs = x, branch, weight, bias, eps, prefix_tokens, training, layer_norm_dtype(x, dtype)
    some_prefix = x.dim() == 3 and 0 < abs(prefix_tokens) <= x.shape[1]
    if not (_are_alike(x, branch, weight, bias) and (some_prefix or not prefix_tokens)):
        add_norm_operator.check(*inputs)
    unsupported = add_norm_operator.unsupported(x) or unsupported
    backend = backends.choose("add_norm", x, dtype, unsupported).backend
    if backend == "reference":
        total, out = add_norm_reference(x, branch, weight, bias, eps)
        prefix = prefix_of(total, prefix_tokens) if prefix_tokens else total
    elif branch is None and training:
        total, out, prefix = _without_branch(*inputs, backend)
    else:
        total, out, prefix, *_ = add_norm_operator(*inputs, backend)
        total = x if branch is None else total
    if num_prefix_tokens is None:
        return total, out
    return total, out, prefix if prefix_tokens else total[:, :0]


add_layer_norm = names_its_arguments(add_norm)


def _are_alike(x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the arguments are what they mostly are, which is quicker to tell than whether they are allowed."""
    shape, dtype, device = x.shape, x.dtype, x.device
    if not shape or not shape[-1] or not dtype.is_floating_point:
        return False
    if branch is not None and (branch.shape != shape or branch.dtype != dtype or branch.device != device):
        return False
    row = shape[-1:]
    return all(p is None or (p.shape == row and p.dtype == dtype and p.device == device) for p in (weight, bias))


class _WithoutBranch(torch.autograd.Function):
    """The operator without a branch, and x itself for the sum, which a registered operator may not return.

    So the gradient of the sum is added in the pass that takes the norm's.
    """

    @staticmethod
    def forward(ctx, x: Tensor, *rest) -> tuple[Tensor | None, ...]:
        results = add_norm_operator(x, *rest)
        ctx.set_materialize_grads(False)
        add_norm_operator.save(ctx, (x, *rest), results)
        return x.view_as(x), results[1], results[2]

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return add_norm_operator.backward_of_function(ctx, *grads)


_without_branch: Callable[..., Any] = _WithoutBranch.apply
