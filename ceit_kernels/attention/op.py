"""``ceit::attention`` and its backward: schema, checks, autograd, autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..common.autocast import autocast_dtype
from ..common.checks import check_device, check_dtype, check_floating, check_shape
from ..common.flops import matmul_flops, register_flops
from ..common.registration import (
    is_eager,
    loop_over_batch,
    refuse_gradient,
    register_autocast,
    unsupported_reason,
)
from .cpu import kernels
from .reference import self_attention_reference

__all__ = ["self_attention"]

# Statistics, for backward: of each query the largest score, and the sum of the exponentials relative to it. Their
# logarithm, in one number, would cost large scores the digits that the exponential magnifies.
torch.library.define(
    "ceit::attention",
    "(Tensor qkv, int num_heads, float scale, SymInt num_queries, bool need_statistics, str backend) "
    "-> (Tensor out, Tensor statistics)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "ceit::attention_backward",
    "(Tensor grad_out, Tensor qkv, Tensor statistics, int num_heads, float scale, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def self_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    scale: float | None = None,
    num_queries: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Multi-head self-attention over queries, keys and values as one projection writes them.

    Computes ``softmax(scale * q k^T) v`` for every head, reading the heads where they lie. By the backend that
    ``use_backend`` set. Differentiable once (any number of times by the reference with PyTorch's ``SDPBackend.MATH``).

    Args:
        qkv: (B, N, 3 * H * D), of each token the queries of all heads, then the keys, then the values.
        num_heads: heads H; the last dimension must be a multiple of 3 H.
        scale: factor of the scores, by default ``D ** -0.5``.
        num_queries: let only the first tokens attend, to all N; every token if None.
        dropout_p: probability of dropping an attention weight, in [0, 1); above 0 only the reference serves the call.

    Returns:
        (B, num_queries, H * D), the heads side by side; under autocast in autocast's dtype.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or value is wrong.
        BackendError: the backend that was asked for cannot serve the call.
    """
    num_queries = qkv.shape[1] if num_queries is None and qkv.dim() == 3 else num_queries
    _check(qkv, num_heads, num_queries)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    scale = (qkv.shape[2] // (3 * num_heads)) ** -0.5 if scale is None else scale
    limit = "the kernels have no attention dropout" if dropout_p > 0.0 else unsupported_reason(qkv)
    training = torch.is_grad_enabled() and qkv.requires_grad
    phase = "training" if training else "inference"
    choice = backends.choose("attention", qkv, autocast_dtype(qkv) or qkv.dtype, limit, phase)
    if choice.backend == "reference":
        return self_attention_reference(qkv, num_heads, scale, num_queries, dropout_p)
    arguments = (qkv, num_heads, scale, num_queries, training, choice.backend)
    if not is_eager(qkv) or autocast_dtype(qkv) is not None:
        return torch.ops.ceit.attention(*arguments)[0]
    return _Eager.apply(*arguments)[0] if training else _forward(*arguments)[0]


def _check(qkv: Tensor, num_heads: int, num_queries: int) -> None:
    check_shape("qkv", qkv, "B", "N", "3 * H * D")
    check_floating("qkv", qkv)
    if qkv.shape[1] < 1:
        raise ValueError(f"qkv: expected shape (B, N, 3 * H * D) with at least one token, got {tuple(qkv.shape)}")
    if num_heads < 1 or qkv.shape[2] < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"num_heads: expected a divisor of a third of {qkv.shape[2]} channels of qkv, got {num_heads}")
    if not 1 <= num_queries <= qkv.shape[1]:
        raise ValueError(f"num_queries: expected from 1 to the {qkv.shape[1]} tokens of qkv, got {num_queries}")


def _results(qkv: Tensor, num_heads: int, num_queries: int, need_statistics: bool) -> tuple[Tensor, Tensor]:
    """Tensors like the results of the forward operator; statistics have no element where they are not wanted."""
    batch, _, width = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    statistics = (batch, num_heads, num_queries, 2) if need_statistics else (0,)
    return qkv.new_empty((batch, num_queries, width // 3)), qkv.new_empty(statistics, dtype=wide)


def _forward(qkv, num_heads, scale, num_queries, need_statistics, backend):
    _check(qkv, num_heads, num_queries)
    backends.require("attention", backend, qkv, qkv.dtype)
    out, statistics = _results(qkv, num_heads, num_queries, need_statistics)
    kernels._attention(qkv.contiguous(), num_heads, scale, out, statistics if need_statistics else None)
    return out, statistics


torch.library.impl("ceit::attention", "default", _forward)


@torch.library.register_fake("ceit::attention")
def _forward_fake(qkv, num_heads, scale, num_queries, need_statistics, backend):
    _check(qkv, num_heads, num_queries)
    return _results(qkv, num_heads, num_queries, need_statistics)


def _check_backward(grad_out: Tensor, qkv: Tensor, statistics: Tensor, num_heads: int) -> None:
    check_shape("grad_out", grad_out, qkv.shape[0], "num_queries", qkv.shape[2] // 3)
    check_dtype("grad_out", grad_out, qkv.dtype, "qkv")
    _check(qkv, num_heads, grad_out.shape[1])
    check_shape("statistics", statistics, qkv.shape[0], num_heads, grad_out.shape[1], 2)
    check_dtype("statistics", statistics, torch.promote_types(qkv.dtype, torch.float32), "qkv")
    for name, tensor in (("grad_out", grad_out), ("statistics", statistics)):
        check_device(name, tensor, qkv, "qkv")


def _backward(grad_out, qkv, statistics, num_heads, scale, backend):
    _check_backward(grad_out, qkv, statistics, num_heads)
    backends.require("attention", backend, qkv, qkv.dtype)
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    tensors = grad_out.contiguous(), qkv.contiguous(), statistics.contiguous()
    kernels._attention_backward(*tensors, num_heads, scale, grad_qkv)
    return grad_qkv


torch.library.impl("ceit::attention_backward", "default", _backward)


@torch.library.register_fake("ceit::attention_backward")
def _backward_fake(grad_out, qkv, statistics, num_heads, scale, backend):
    _check_backward(grad_out, qkv, statistics, num_heads)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    qkv, ctx.num_heads, ctx.scale, _, ctx.has_statistics, ctx.backend = inputs
    _, statistics = output
    ctx.save_for_backward(qkv, statistics)
    ctx.mark_non_differentiable(statistics)


def _gradients(backward, ctx, grad_out):
    """The gradients of the forward operator's arguments, by the backward operator or its implementation."""
    if not ctx.has_statistics:
        raise RuntimeError("ceit::attention: expected need_statistics=True where a gradient is taken, got False")
    grad_qkv = backward(grad_out, *ctx.saved_tensors, ctx.num_heads, ctx.scale, ctx.backend)
    return grad_qkv, *(None,) * 5  # num_heads, scale, num_queries, need_statistics, backend


def _autograd_backward(ctx, grad_out, _):
    return _gradients(torch.ops.ceit.attention_backward, ctx, grad_out)


torch.library.register_autograd("ceit::attention", _autograd_backward, setup_context=_setup_context)
refuse_gradient(
    "ceit::attention_backward",
    "ceit_kernels.self_attention is differentiable once; for second derivatives run it under "
    'ceit_kernels.use_backend("reference") and torch.nn.attention.sdpa_kernel(SDPBackend.MATH)',
)

loop_over_batch("ceit::attention_backward")


@register_autocast("ceit::attention")
def _autocast(dtype, qkv, *settings):
    return torch.ops.ceit.attention(qkv if qkv.dtype == torch.float64 else qkv.to(dtype), *settings)


class _Eager(torch.autograd.Function):
    """The operator outside any graph, without what a registered one costs a call."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad_out, _):
        # The registered operator where the gradient of this gradient is to be refused, or gradients come in batches.
        directly = is_eager(grad_out) and not torch.is_grad_enabled()
        return _gradients(_backward if directly else torch.ops.ceit.attention_backward, ctx, grad_out)


@register_flops("ceit::attention")
def _flops(qkv, num_heads, scale, num_queries, *rest, out_shape, **options):
    batch, tokens, width = qkv
    return 2 * batch * matmul_flops(num_queries, width // 3, tokens)  # scores, and the weighted sums


@register_flops("ceit::attention_backward")
def _backward_flops(grad_out, qkv, *rest, out_shape, **options):
    batch, tokens, width = qkv
    return 5 * batch * matmul_flops(grad_out[1], width // 3, tokens)  # scores again, and gradients of four operands
