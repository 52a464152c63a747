"""Attention by PyTorch on a GPU, its gradients put together and those of both biases summed in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ..common.calls import unsupported_reason
from ..common.checks import check_device, check_dtype, check_floating, check_shape
from ..common.given import linear_given
from ..common.operator import Operator

__all__ = ["attend_by_parts"]

_MAX_CHANNELS, _MAX_ROWS = 4096, 2**31 - 4096  # a row is held in registers; rows are counted in 32 bits


class _QKVGradient(Operator):
    # The gradients of queries (B, P, H, D), of the first P tokens of N, keys and values (B, N, H, D), as that of their
    # projection (B, N, 3 * H * D), and unless bias_dtype is None its sum over the tokens, that of a bias. Likewise the
    # sum of the gradient of another projection (B * P, H * D), behind attention.
    name = "qkv_gradient"
    operator = "attention"
    schema = (
        "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor? grad_out, bool need_qkv, ScalarType? bias_dtype, "
        "ScalarType? out_bias_dtype, str backend) -> (Tensor grad_qkv, Tensor grad_bias, Tensor grad_out_bias)"
    )
    public_name = "ceit_kernels.self_attention"

    def check(self, grad_q, grad_k, grad_v, grad_out, need_qkv, bias_dtype, out_bias_dtype):
        check_floating("grad_k", grad_k)
        check_shape("grad_k", grad_k, "B", "N", "H", "D")
        check_shape("grad_q", grad_q, grad_k.shape[0], "P", *grad_k.shape[2:])
        check_shape("grad_v", grad_v, *grad_k.shape)
        if not grad_q.shape[1] <= grad_k.shape[1]:
            raise ValueError(f"grad_q: expected at most {grad_k.shape[1]} tokens, got {grad_q.shape[1]}")
        others = [("grad_q", grad_q), ("grad_v", grad_v)]
        if (grad_out is None) != (out_bias_dtype is None):
            raise ValueError("grad_out: expected with out_bias_dtype, or neither")
        if grad_out is not None:
            check_shape("grad_out", grad_out, grad_q.shape[0] * grad_q.shape[1], grad_k.shape[2] * grad_k.shape[3])
            others.append(("grad_out", grad_out))
        for name, tensor in others:
            check_dtype(name, tensor, grad_k.dtype, "grad_k")
            check_device(name, tensor, grad_k, "grad_k")

    def unsupported(self, grad_q, grad_k, *rest):
        channels = grad_k.shape[2] * grad_k.shape[3]
        if channels > _MAX_CHANNELS:
            return f"the kernel takes up to {_MAX_CHANNELS} channels, grad_k has {channels}"
        rows = grad_k.shape[0] * grad_k.shape[1]
        return f"the kernel takes from 1 to {_MAX_ROWS} rows, grad_k has {rows}" if not 0 < rows <= _MAX_ROWS else None

    def autocast(self, dtype, *inputs):
        return inputs

    def forward(self, grad_q, grad_k, grad_v, grad_out, need_qkv, bias_dtype, out_bias_dtype, backend):
        from .triton.launch import qkv_gradient_triton

        return qkv_gradient_triton(grad_q, grad_k, grad_v, grad_out, need_qkv, bias_dtype, out_bias_dtype)

    def fake(self, grad_q, grad_k, grad_v, grad_out, need_qkv, bias_dtype, out_bias_dtype, backend):
        width = grad_k.shape[2] * grad_k.shape[3]
        grad = grad_k.new_empty(*grad_k.shape[:2], 3 * width) if need_qkv else None
        bias = None if bias_dtype is None else grad_k.new_empty(3 * width, dtype=bias_dtype)
        return grad, bias, None if out_bias_dtype is None else grad_k.new_empty(width, dtype=out_bias_dtype)


_qkv_gradient = _QKVGradient()


class _Parts(torch.autograd.Function):
    """The queries (B, num_queries, H, D), keys and values (B, N, H, D) in their projection, where they lie.

    The projection has a bias, if one is given, whose gradient is taken here. If the bias of a projection behind
    attention is given, its gradient is taken here too, of the gradient of the last result, which has no values.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor | None, out_bias: Tensor | None, num_heads: int, num_queries: int
    ) -> tuple[Tensor, ...]:
        ctx.dtypes = [None if b is None else b.dtype for b in (bias, out_bias)]
        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).unbind(2)
        parts = q[:, :num_queries], k, v
        if out_bias is None:
            return parts
        return *parts, qkv.new_empty(1).expand(qkv.shape[0] * num_queries, qkv.shape[2] // 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        need_qkv, *needs = ctx.needs_input_grad[:3]
        bias_dtype, out_bias_dtype = (dtype if need else None for dtype, need in zip(ctx.dtypes, needs, strict=True))
        grad_q, grad_k, grad_v, *given = grads
        grad_out = None if out_bias_dtype is None else given[0]
        arguments = grad_q, grad_k, grad_v, grad_out, need_qkv, bias_dtype, out_bias_dtype
        # Second derivatives and batches of gradients are PyTorch's.
        plain = torch.is_grad_enabled() or unsupported_reason(*grads) or _qkv_gradient.unsupported(*arguments)
        plain = plain or any(map(is_legacy_batchedtensor, grads))
        found = _put_together(*arguments) if plain else _qkv_gradient(*arguments, "triton")
        wanted = need_qkv, *needs
        return *(grad if need else None for grad, need in zip(found, wanted, strict=True)), None, None


_parts: Callable[..., Any] = _Parts.apply


def _put_together(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_out: Tensor | None,
    need_qkv: bool,
    bias_dtype: torch.dtype | None,
    out_bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What ``ceit::qkv_gradient`` computes, in plain PyTorch."""
    grad_q = F.pad(grad_q, (0, 0, 0, 0, 0, grad_k.shape[1] - grad_q.shape[1]))
    grad = torch.stack((grad_q, grad_k, grad_v), 2).reshape(*grad_k.shape[:2], -1)
    bias = None if bias_dtype is None else grad.sum((0, 1)).to(bias_dtype)
    return grad, bias, None if grad_out is None else grad_out.sum(0).to(out_bias_dtype)


def attend_by_parts(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    scale: float,
    num_queries: int,
    projection: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention as ``self_attention`` has it, its arguments checked, in eager mode.

    Args:
        qkv: (B, N, 3 * H * D), its gradient that of a projection whose bias was detached.
        bias: (3 * H * D,), which is in qkv already and gets its gradient here; None for none.
        num_heads: heads H.
        scale: factor of the scores.
        num_queries: how many of the first tokens attend.
        projection: weight (H * D, H * D) and bias (H * D,) of a linear layer behind attention; None for none.

    Returns:
        (B, num_queries, H * D), the heads side by side, or their projection.
    """
    weight, out_bias = projection or (None, None)
    q, k, v, *given = _parts(qkv, bias, out_bias, num_heads, num_queries)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    if weight is None or out_bias is None:
        return out
    return linear_given(out, weight, out_bias, *given)
