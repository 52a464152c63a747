"""``ceit::linear`` and its gradient."""

from __future__ import annotations

import math

from ..common.checks import check_floating, check_parameters, check_shape
from ..common.flops import matmul_flops
from ..common.operator import Operator
from .cpu import linear_backward_cpu, linear_forward_cpu

__all__ = ["linear_operator"]


class _Linear(Operator):
    name = "linear"
    schema = "(Tensor x, Tensor weight, Tensor? bias, ScalarType? compute_dtype, str backend) -> Tensor"
    backward_schema = (
        "(Tensor grad_out, Tensor x, Tensor weight, bool need_x, bool need_weight, bool need_bias, "
        "ScalarType? compute_dtype, str backend) -> (Tensor, Tensor, Tensor)"
    )
    public_name = "ceit_kernels.FusedLinear"

    def check(self, x, weight, bias, compute_dtype):
        if x.dim() < 1:
            raise ValueError("x: expected at least one dimension, got a scalar")
        check_floating("x", x)
        check_shape("weight", weight, "N", x.shape[-1])
        if bias is not None:
            check_shape("bias", bias, weight.shape[0])
        check_parameters(x, compute_dtype, weight=weight, bias=bias)

    def forward(self, x, weight, bias, compute_dtype, backend):
        return linear_forward_cpu(x, weight, bias, compute_dtype or x.dtype)

    def fake(self, x, weight, bias, compute_dtype, backend):
        return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=compute_dtype or x.dtype)

    def flops(self, x, weight, *rest, **options):
        return matmul_flops(math.prod(x[:-1]), weight[1], weight[0])

    def save(self, ctx, inputs, results):
        x, weight, _, ctx.compute_dtype, ctx.backend = inputs
        ctx.save_for_backward(x, weight)

    def gradients(self, backward, ctx, grad_out):
        return backward(grad_out, *ctx.saved_tensors, *ctx.needs_input_grad[:3], ctx.compute_dtype, ctx.backend)

    def check_backward(self, grad_out, x, weight, need_x, need_weight, need_bias, compute_dtype, backend):
        self.check(x, weight, None, compute_dtype)
        check_shape("grad_out", grad_out, *x.shape[:-1], weight.shape[0])

    def backward(self, grad_out, x, weight, need_x, need_weight, need_bias, compute_dtype, backend):
        return linear_backward_cpu(grad_out, x, weight, need_x, need_weight, need_bias, compute_dtype or x.dtype)

    def fake_backward(self, grad_out, x, weight, need_x, need_weight, need_bias, compute_dtype, backend):
        return (
            x.new_empty(x.shape) if need_x else None,
            weight.new_empty(weight.shape) if need_weight else None,
            weight.new_empty(weight.shape[0]) if need_bias else None,
        )

    def backward_flops(self, grad_out, x, weight, need_x, need_weight, *rest, **options):
        return (need_x + need_weight) * self.flops(x, weight)


linear_operator = _Linear()
