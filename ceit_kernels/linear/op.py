"""``ceit::linear`` and its backward: schema, checks, autograd, autocast; and the same for a call outside any graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..common.checks import check_device, check_dtype, check_floating, check_shape
from ..common.flops import matmul_flops, register_flops
from ..common.matmul import linear, matmul, weight_gradient
from ..common.registration import is_eager, loop_over_batch, refuse_gradient, register_autocast

__all__ = ["linear_eagerly"]

torch.library.define(
    "ceit::linear",
    "(Tensor x, Tensor weight, Tensor? bias, ScalarType? compute_dtype, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "ceit::linear_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, bool need_x, bool need_weight, bool need_bias, "
    "ScalarType? compute_dtype, str backend) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype | None, backend: str
) -> torch.dtype:
    """Check a direct call of an operator; the dtype that it computes in."""
    if x.dim() < 1:
        raise ValueError("x: expected at least one dimension, got a scalar")
    check_floating("x", x)
    check_shape("weight", weight, "N", x.shape[-1])
    parameters = {"weight": weight}
    if bias is not None:
        check_shape("bias", bias, weight.shape[0])
        parameters["bias"] = bias
    for name, parameter in parameters.items():
        check_floating(name, parameter)
        check_device(name, parameter, x, "x")
        if compute_dtype is None:
            check_dtype(name, parameter, x.dtype, "x")
    dtype = compute_dtype or x.dtype
    backends.require("linear", backend, x, dtype)
    return dtype


def _matrix(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``ceit::linear``'s result in ``dtype``, its arguments checked; has no gradient."""
    matrix = _matrix(x, dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if matrix.numel() == 0:
        return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias)
    # No view, which a Function must not return for its user to write to.
    return torch.ops.aten._unsafe_view(linear(matrix, weight.to(dtype), bias), [*x.shape[:-1], weight.shape[0]])


@torch.library.impl("ceit::linear", "default")
def _forward(x, weight, bias, compute_dtype, backend):
    return _linear_cpu(x, weight, bias, _prepare(x, weight, bias, compute_dtype, backend))


@torch.library.register_fake("ceit::linear")
def _forward_fake(x, weight, bias, compute_dtype, backend):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=compute_dtype or x.dtype)


def _linear_backward_cpu(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    needs: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``ceit::linear_backward``'s results, its arguments checked; None for those that are not needed."""
    need_x, need_weight, need_bias = needs
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


@torch.library.impl("ceit::linear_backward", "default")
def _backward(grad_out, x, weight, need_x, need_weight, need_bias, compute_dtype, backend):
    dtype = _prepare(x, weight, None, compute_dtype, backend)
    check_shape("grad_out", grad_out, *x.shape[:-1], weight.shape[0])
    grads = _linear_backward_cpu(grad_out, x, weight, (need_x, need_weight, need_bias), dtype)
    # An operator must return tensors.
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("ceit::linear_backward")
def _backward_fake(grad_out, x, weight, need_x, need_weight, need_bias, compute_dtype, backend):
    return (
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape) if need_weight else x.new_empty(0),
        weight.new_empty(weight.shape[0]) if need_bias else x.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    x, weight, _, ctx.compute_dtype, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _autograd_backward(ctx, grad_out):
    needs = ctx.needs_input_grad[:3]
    grads = torch.ops.ceit.linear_backward(grad_out, *ctx.saved_tensors, *needs, ctx.compute_dtype, ctx.backend)
    no_gradient = (None,) * 2  # compute_dtype, backend
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *no_gradient


torch.library.register_autograd("ceit::linear", _autograd_backward, setup_context=_setup_context)
refuse_gradient(
    "ceit::linear_backward",
    "ceit_kernels.FusedLinear is differentiable once; for second derivatives run it under "
    'ceit_kernels.use_backend("reference")',
)
loop_over_batch("ceit::linear_backward")


@register_autocast("ceit::linear")
def _autocast(dtype, x, weight, bias, compute_dtype, backend):
    compute_dtype = compute_dtype or (None if x.dtype == torch.float64 else dtype)
    return torch.ops.ceit.linear(x, weight, bias, compute_dtype, backend)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
        _setup_context(ctx, (x, weight, bias, dtype, backend), None)
        return _linear_cpu(x, weight, bias, dtype)

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        # Where the gradient of this gradient is refused, or gradients come in batches.
        if torch.is_grad_enabled() or not is_eager(grad_out):
            return _autograd_backward(ctx, grad_out)
        grads = _linear_backward_cpu(grad_out, *ctx.saved_tensors, ctx.needs_input_grad[:3], ctx.compute_dtype)
        return *grads, None, None  # dtype, backend


def linear_eagerly(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str, training: bool
) -> Tensor:
    """``ceit::linear`` outside any graph, its arguments checked, without what a registered operator costs a call.

    Args:
        x, weight, bias, backend: as of the operator.
        dtype: what it computes in.
        training: whether a gradient is wanted.
    """
    if training:
        return _Eager.apply(x, weight, bias, dtype, backend)
    return _linear_cpu(x, weight, bias, dtype)


@register_flops("ceit::linear")
def _flops(x, weight, *rest, out_shape, **options):
    return matmul_flops(math.prod(x[:-1]), weight[1], weight[0])


@register_flops("ceit::linear_backward")
def _backward_flops(grad_out, x, weight, need_x, need_weight, *rest, out_shape, **options):
    return (need_x + need_weight) * matmul_flops(math.prod(x[:-1]), weight[1], weight[0])
