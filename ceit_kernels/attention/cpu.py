"""Self-attention on the CPU, a tile of queries at a time: the schemas of ``csrc/cpu/attention``, and its buffers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_backward_cpu", "attention_forward_cpu", "attention_infer_cpu", "empty_results"]

torch.library.define(
    "ceit::_attention", "(Tensor qkv, int num_heads, float scale, Tensor(a!) out, Tensor(b!)? statistics) -> ()"
)
torch.library.define(
    "ceit::_attention_backward",
    "(Tensor grad_out, Tensor qkv, Tensor statistics, int num_heads, float scale, Tensor(a!) grad_qkv) -> ()",
)

torch.library.define(
    "ceit::_attention_infer", "(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, Tensor(a!) out) -> ()"
)

_forward, _backward = torch.ops.ceit._attention.default, torch.ops.ceit._attention_backward.default


def empty_results(qkv: Tensor, num_heads: int, num_queries: int, need_statistics: bool) -> tuple[Tensor, Tensor | None]:
    """Tensors for the results of ``ceit::attention``."""
    batch, _, width = qkv.shape
    statistics = None
    if need_statistics:
        acc_dtype = torch.promote_types(qkv.dtype, torch.float32)
        statistics = qkv.new_empty((batch, num_heads, num_queries, 2), dtype=acc_dtype)
    return qkv.new_empty((batch, num_queries, width // 3)), statistics


def attention_forward_cpu(
    qkv: Tensor, num_heads: int, scale: float, num_queries: int, need_statistics: bool
) -> tuple[Tensor, Tensor | None]:
    """The results of ``ceit::attention``, its arguments checked."""
    out, statistics = empty_results(qkv, num_heads, num_queries, need_statistics)
    _forward(qkv.contiguous(), num_heads, scale, out, statistics)
    return out, statistics


def attention_backward_cpu(grad_out: Tensor, qkv: Tensor, statistics: Tensor, num_heads: int, scale: float) -> Tensor:
    """The gradient of qkv, its arguments checked."""
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _backward(grad_out.contiguous(), qkv.contiguous(), statistics.contiguous(), num_heads, scale, grad_qkv)
    return grad_qkv


def attention_infer_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of q (B, H, M, D) to k and v (B, H, N, D) as (B, M, H * D), without a gradient.

    Args:
        q, k, v: with any strides.
        bias: (H, M, N), added to the scores, or None.
        scale: of the scores.
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, queries, channels = q.shape
    out = q.new_empty((batch, queries, heads * channels))
    torch.ops.ceit._attention_infer.default(q, k, v, bias if bias is None else bias.contiguous(), scale, out)
    return out
