"""``ceit::linear`` and its backward: schema, checks, autograd, autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..common.checks import check_device, check_dtype, check_floating, check_shape
from ..common.products import linear, packed, product, transposed
from ..common.registration import refuse_gradient, register_autocast

__all__: list[str] = []

# `constant` promises that the weight is used again before it changes, so that packing it pays.
torch.library.define(
    "ceit::linear",
    "(Tensor x, Tensor weight, Tensor? bias, bool constant, ScalarType? compute_dtype, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "ceit::linear_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, bool need_x, bool need_weight, ScalarType? compute_dtype, "
    "str backend) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype | None, backend: str
) -> torch.dtype:
    """Check a call of an operator; the dtype that it computes in."""
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
    return x.reshape(-1, x.shape[-1]).to(dtype).contiguous()


@torch.library.impl("ceit::linear", "default")
def _forward(x, weight, bias, constant, compute_dtype, backend):
    dtype = _prepare(x, weight, bias, compute_dtype, backend)
    matrix, bias = _matrix(x, dtype), None if bias is None else bias.to(dtype)
    if matrix.numel() == 0:
        return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias)
    ready = packed(weight, matrix.shape[0]) if constant and weight.dtype == dtype else weight.to(dtype)
    return linear(matrix, ready, bias).view(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("ceit::linear")
def _forward_fake(x, weight, bias, constant, compute_dtype, backend):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=compute_dtype or x.dtype)


@torch.library.impl("ceit::linear_backward", "default")
def _backward(grad_out, x, weight, need_x, need_weight, compute_dtype, backend):
    dtype = _prepare(x, weight, None, compute_dtype, backend)
    matrix, gradient = _matrix(x, dtype), _matrix(grad_out, dtype)
    grad_x = grad_weight = x.new_empty(0)
    if matrix.numel() == 0:
        return torch.zeros_like(x) if need_x else grad_x, torch.zeros_like(weight) if need_weight else grad_weight
    if need_x:
        grad_x = product(gradient, weight.to(dtype)).view(x.shape).to(x.dtype)
    if need_weight:
        # The narrower of the two is the one to transpose.
        if gradient.shape[1] <= matrix.shape[1]:
            grad_weight = product(transposed(gradient), matrix)
        else:
            grad_weight = transposed(product(transposed(matrix), gradient))
        grad_weight = grad_weight.to(weight.dtype)
    return grad_x, grad_weight


@torch.library.register_fake("ceit::linear_backward")
def _backward_fake(grad_out, x, weight, need_x, need_weight, compute_dtype, backend):
    def like(tensor, needed):
        return torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else x.new_empty(0)

    return like(x, need_x), like(weight, need_weight)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, ctx.compute_dtype, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _autograd_backward(ctx, grad_out):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_x = grad_weight = grad_bias = None
    if need_x or need_weight:
        found = torch.ops.ceit.linear_backward(grad_out, x, weight, need_x, need_weight, ctx.compute_dtype, ctx.backend)
        grad_x, grad_weight = (grad if need else None for grad, need in zip(found, (need_x, need_weight), strict=True))
    if need_bias:
        grad_bias = grad_out.flatten(0, -2).sum(0) if grad_out.dim() > 1 else grad_out
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, None, None, None


torch.library.register_autograd("ceit::linear", _autograd_backward, setup_context=_setup_context)
refuse_gradient(
    "ceit::linear_backward",
    "ceit_kernels.FusedLinear is differentiable once; for second derivatives run it under "
    'ceit_kernels.use_backend("reference")',
)


@register_autocast("ceit::linear")
def _autocast(dtype, x, weight, bias, constant, compute_dtype, backend):
    compute_dtype = compute_dtype or (None if x.dtype == torch.float64 else dtype)
    return torch.ops.ceit.linear(x, weight, bias, constant, compute_dtype, backend)
