"""``ceit::linear``: schema, checks, autocast. It has no gradient, for which PyTorch's own is as fast."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..common.checks import check_device, check_dtype, check_floating, check_shape
from ..common.products import linear, packed
from ..common.registration import refuse_gradient, register_autocast

__all__: list[str] = []

# `constant` promises that the weight is used again before it changes, so that packing it pays.
torch.library.define(
    "ceit::linear",
    "(Tensor x, Tensor weight, Tensor? bias, bool constant, ScalarType? compute_dtype, str backend) -> Tensor",
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


refuse_gradient(
    "ceit::linear",
    "ceit::linear has no gradient; ceit_kernels.FusedLinear calls torch.nn.functional.linear where one is needed",
)


@register_autocast("ceit::linear")
def _autocast(dtype, x, weight, bias, constant, compute_dtype, backend):
    compute_dtype = compute_dtype or (None if x.dtype == torch.float64 else dtype)
    return torch.ops.ceit.linear(x, weight, bias, constant, compute_dtype, backend)
