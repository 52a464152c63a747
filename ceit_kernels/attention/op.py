"""``ceit::attention`` and its gradient."""

from __future__ import annotations

import torch

from ..backends import BackendError
from ..common.checks import check_device, check_dtype, check_floating, check_shape
from ..common.flops import matmul_flops
from ..common.operator import Operator
from .cpu import attention_backward_cpu, attention_forward_cpu, empty_results

__all__ = ["attention_operator"]


class _Attention(Operator):
    # Statistics, for backward: of each query the largest score, and the sum of the exponentials relative to it. Their
    # logarithm, in one number, would cost large scores the digits that the exponential magnifies.
    name = "attention"
    schema = (
        "(Tensor qkv, int num_heads, float scale, SymInt num_queries, bool need_statistics, str backend) "
        "-> (Tensor out, Tensor statistics)"
    )
    backward_schema = (
        "(Tensor grad_out, Tensor qkv, Tensor statistics, int num_heads, float scale, str backend) -> Tensor"
    )
    public_name = "ceit_kernels.self_attention"
    twice = Operator.twice + " and torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"

    def check(self, qkv, num_heads, scale, num_queries, need_statistics):
        check_shape("qkv", qkv, "B", "N", "3 * H * D")
        check_floating("qkv", qkv)
        tokens, width = qkv.shape[1:]
        if tokens < 1:
            raise ValueError(f"qkv: expected shape (B, N, 3 * H * D) with at least one token, got {tuple(qkv.shape)}")
        if num_heads < 1 or width < 1 or width % (3 * num_heads):
            raise ValueError(f"num_heads: expected a divisor of a third of {width} channels of qkv, got {num_heads}")
        if not 1 <= num_queries <= tokens:
            raise ValueError(f"num_queries: expected from 1 to the {tokens} tokens of qkv, got {num_queries}")

    def forward(self, qkv, num_heads, scale, num_queries, need_statistics, backend):
        if backend != "native":
            why = "around PyTorch's attention it is no operator, call the function in ceit_kernels instead"
            raise BackendError(f"ceit::attention: backend {backend!r} cannot run: {why}")
        return attention_forward_cpu(qkv, num_heads, scale, num_queries, need_statistics)

    def fake(self, qkv, num_heads, scale, num_queries, need_statistics, backend):
        return empty_results(qkv, num_heads, num_queries, need_statistics)

    def flops(self, qkv, num_heads, scale, num_queries, *rest, **options):
        batch, tokens, width = qkv
        return 2 * batch * matmul_flops(num_queries, width // 3, tokens)  # scores, and the weighted sums

    def autocast(self, dtype, qkv, *settings):
        return qkv if qkv.dtype == torch.float64 else qkv.to(dtype), *settings

    def save(self, ctx, inputs, results):
        qkv, ctx.num_heads, ctx.scale, _, ctx.has_statistics, ctx.backend = inputs
        ctx.save_for_backward(qkv, results[1])

    def gradients(self, backward, ctx, grad_out, *_):
        if not ctx.has_statistics:
            raise RuntimeError("ceit::attention: expected need_statistics=True where a gradient is taken, got False")
        return (backward(grad_out, *ctx.saved_tensors, ctx.num_heads, ctx.scale, ctx.backend),)

    def check_backward(self, grad_out, qkv, statistics, num_heads, scale, backend):
        check_shape("grad_out", grad_out, qkv.shape[0], "num_queries", qkv.shape[2] // 3)
        check_dtype("grad_out", grad_out, qkv.dtype, "qkv")
        self.check(qkv, num_heads, scale, grad_out.shape[1], True)
        check_shape("statistics", statistics, qkv.shape[0], num_heads, grad_out.shape[1], 2)
        check_dtype("statistics", statistics, torch.promote_types(qkv.dtype, torch.float32), "qkv")
        for name, tensor in (("grad_out", grad_out), ("statistics", statistics)):
            check_device(name, tensor, qkv, "qkv")

    def backward(self, grad_out, qkv, statistics, num_heads, scale, backend):
        return attention_backward_cpu(grad_out, qkv, statistics, num_heads, scale)

    def fake_backward(self, grad_out, qkv, *rest):
        return torch.empty_like(qkv, memory_format=torch.contiguous_format)

    def backward_flops(self, grad_out, qkv, *rest, **options):
        batch, tokens, width = qkv
        return 5 * batch * matmul_flops(grad_out[1], width // 3, tokens)  # scores again, gradients of four operands


attention_operator = _Attention()
