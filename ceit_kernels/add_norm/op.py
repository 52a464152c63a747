"""``ceit::add_norm`` and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from ..common.autocast import is_autocast_enabled
from ..common.checks import check_device, check_dtype, check_floating, check_shape
from ..common.operator import Operator, gradients_like
from .cpu import add_norm_backward_cpu, add_norm_forward_cpu, total_dtype
from .reference import prefix_of
from .triton import TICKETS

__all__ = ["add_norm_operator", "layer_norm_dtype"]

_MAX_CHANNELS, _MAX_ROWS = 4096, 2**31 - 4096  # a row is held in registers; rows are counted in 32 bits


def layer_norm_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype | None:
    """What layer_norm of a sum of ``dtype`` returns under autocast; None where autocast is off."""
    device_type = "cuda" if x.is_cuda else x.device.type
    if not is_autocast_enabled(device_type):
        return None
    # On CUDA it is one of the operators that run in float32; on a CPU it takes what it is given.
    return torch.float32 if x.is_cuda and dtype != torch.float64 else dtype


class _AddNorm(Operator):
    name = "add_norm"
    schema = (
        "(Tensor x, Tensor? branch, Tensor? weight, Tensor? bias, float eps, int num_prefix_tokens, "
        "bool need_statistics, ScalarType? out_dtype, str backend) "
        "-> (Tensor total, Tensor out, Tensor prefix, Tensor mean, Tensor rstd, Tensor tickets)"
    )
    backward_schema = (
        "(Tensor grad_out, Tensor? grad_total, Tensor? grad_prefix, Tensor total, Tensor? weight, Tensor? bias, "
        "Tensor mean, Tensor rstd, Tensor? tickets, bool need_input, bool need_weight, bool need_bias, bool last, "
        "str backend) "
        "-> (Tensor, Tensor, Tensor)"
    )
    differentiable = returned = 3
    public_name = "ceit_kernels.add_layer_norm"

    def check(self, x, branch, weight, bias, eps, num_prefix_tokens, need_statistics, out_dtype):
        if x.dim() < 1 or x.shape[-1] < 1:
            raise ValueError(f"x: expected shape (..., C) with at least one channel, got {tuple(x.shape)}")
        check_floating("x", x)
        if branch is not None:
            check_shape("branch", branch, *x.shape)
            check_floating("branch", branch)
            check_device("branch", branch, x, "x")
        dtype = total_dtype(x, branch)
        parameters = [(name, tensor) for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None]
        # As plain PyTorch takes them on the CPU.
        in_float32 = dtype.itemsize == 2 and not x.is_cuda and all(p.dtype == torch.float32 for _, p in parameters)
        for name, parameter in parameters:
            check_shape(name, parameter, x.shape[-1])
            check_floating(name, parameter)
            check_device(name, parameter, x, "x")
            if out_dtype is None and not in_float32:
                check_dtype(name, parameter, dtype, "x" if branch is None else "x + branch")
        if num_prefix_tokens:
            check_shape("x", x, "B", "N", "C")
            if not 0 < abs(num_prefix_tokens) <= x.shape[1]:
                raise ValueError(
                    f"num_prefix_tokens: expected at most the {x.shape[1]} tokens of x, got {num_prefix_tokens}"
                )

    def unsupported(self, x, *rest):
        channels = x.shape[-1]
        if channels > _MAX_CHANNELS:
            return f"the kernels take up to {_MAX_CHANNELS} channels, x has {channels}"
        rows = x.numel() // channels
        # A graph is for any number of rows; the operator in it looks again.
        if not torch.compiler.is_compiling() and rows > _MAX_ROWS:
            return f"the kernels take up to {_MAX_ROWS} rows, x has {rows}"
        return None

    def compute_dtype(self, x, branch, *rest):
        return total_dtype(x, branch)

    def forward(self, x, branch, weight, bias, eps, num_prefix_tokens, need_statistics, out_dtype, backend):
        settings = num_prefix_tokens, need_statistics, out_dtype or total_dtype(x, branch)
        if x.numel() == 0:
            return _results(x.new_zeros, x, branch, *settings, backend)
        if backend == "native":
            return add_norm_forward_cpu(x, branch, weight, bias, eps, *settings)
        return _triton("forward")(x, branch, weight, bias, eps, *settings)

    def fake(self, x, branch, weight, bias, eps, num_prefix_tokens, need_statistics, out_dtype, backend):
        settings = num_prefix_tokens, need_statistics, out_dtype or total_dtype(x, branch)
        return _results(x.new_empty, x, branch, *settings, backend)

    def autocast(self, dtype, *inputs):
        x, branch, *rest, out_dtype, backend = inputs
        return x, branch, *rest, out_dtype or layer_norm_dtype(x, total_dtype(x, branch)), backend

    def save(self, ctx, inputs, results):
        x, branch, weight, bias, _, num_prefix_tokens, *_, ctx.backend = inputs
        ctx.last = num_prefix_tokens < 0
        total, _, _, *saved = results
        ctx.save_for_backward(x if branch is None else total, weight, bias, *saved)
        ctx.dtypes = x.dtype, None if branch is None else branch.dtype

    def gradients(self, backward, ctx, grad_total, grad_out, grad_prefix, *_):
        total, *saved = ctx.saved_tensors
        need_x, need_branch, *need_parameters = ctx.needs_input_grad[:4]
        # Not those of results that were not there.
        grad_total, grad_prefix = [g if g is not None and g.numel() else None for g in (grad_total, grad_prefix)]
        if grad_out is None:
            grad, parameters = _with_prefix(total, grad_total, grad_prefix, ctx.last), (None, None)
        else:
            needs = need_x or need_branch, *need_parameters
            grad, *parameters = backward(
                grad_out, grad_total, grad_prefix, total, *saved, *needs, ctx.last, ctx.backend
            )
        grads = [grad if grad is None or grad.dtype is dtype else dtype and grad.to(dtype) for dtype in ctx.dtypes]
        return *grads, *parameters

    def check_backward(self, grad_out, grad_total, grad_prefix, total, weight, bias, mean, rstd, tickets, *rest):
        check_shape("grad_out", grad_out, *total.shape)
        if grad_total is not None:
            check_shape("grad_total", grad_total, *total.shape)
        if grad_prefix is not None:
            check_shape("grad_prefix", grad_prefix, total.shape[0], "P", total.shape[-1])
        for name, tensor in (("mean", mean), ("rstd", rstd)):
            check_shape(name, tensor, *total.shape[:-1])
        _, *needs, _, backend = rest
        if backend == "triton" and total.numel():
            check_shape("tickets", tickets, TICKETS)
        for name, parameter, need in (("weight", weight, needs[0]), ("bias", bias, needs[1])):
            if need and parameter is None:
                raise ValueError(f"need_{name}: expected False where {name} is None, got True")

    def backward(self, *inputs):
        *tensors, need_input, need_weight, need_bias, last, backend = inputs
        needs = need_input, need_weight, need_bias
        if tensors[3].numel() == 0:
            return gradients_like(tensors[3:6], needs, torch.zeros_like)
        if backend == "triton":
            return _triton("backward")(*tensors, *needs, last=last)
        if last:
            tensors[1:3] = _with_prefix(tensors[3], tensors[1], tensors[2], last), None
        return add_norm_backward_cpu(*tensors[:-1], *needs)

    def fake_backward(self, *inputs):
        return gradients_like(inputs[3:6], inputs[9:12])


@cache
def _triton(phase: str) -> Callable[..., Any]:
    """The function that runs a phase on a GPU; asking a module for it in each call would take as long as a launch."""
    return resolve_name(f"{__package__}.triton.launch:add_norm_{phase}_triton")


def _results(make, x, branch, num_prefix_tokens, need_statistics, out_dtype, backend) -> tuple[Tensor | None, ...]:
    dtype = total_dtype(x, branch)
    acc_dtype = torch.promote_types(dtype, torch.float32)
    return (
        None if branch is None else make(x.shape, dtype=dtype),
        make(x.shape, dtype=out_dtype),
        make((x.shape[0], abs(num_prefix_tokens), x.shape[2]), dtype=dtype) if num_prefix_tokens else None,
        *(make(x.shape[:-1], dtype=acc_dtype) if need_statistics else None for _ in range(2)),
        make(TICKETS, dtype=torch.int32) if need_statistics and backend == "triton" else None,
    )


def _with_prefix(total: Tensor, grad_total: Tensor | None, grad_prefix: Tensor | None, last: bool) -> Tensor | None:
    """The sum's gradient beside that by its norm."""
    if grad_prefix is None:
        return grad_total
    grad = torch.zeros_like(total) if grad_total is None else grad_total.clone()
    prefix_of(grad, -grad_prefix.shape[1] if last else grad_prefix.shape[1]).add_(grad_prefix)
    return grad


add_norm_operator = _AddNorm()
