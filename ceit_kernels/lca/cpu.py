"""Class-token attention across layers on the CPU: few and small matmuls, by PyTorch's own.

W_k is multiplied into the query and W_v into the weighted sum of x, which takes 3 C^2 + 2 H L C multiply-adds an image
instead of (1 + 2 L) C^2 + 2 L C. The key's bias shifts every score of a head alike and drops out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.philox import keep_mask

__all__ = ["lca_backward_cpu", "lca_forward_cpu"]


class _Forward(NamedTuple):
    """What backward computes again; x and the weights in the dtype that matmuls take."""

    x: Tensor  # (B, L, C)
    weights: Tensor  # (3, H, D, C), W_q, W_k and W_v
    q: Tensor  # (H, B, D), with the scale in it
    absorbed: Tensor  # (B, H, C), W_k multiplied into it
    probabilities: Tensor  # (B, H, L), before dropout, in the dtype of sums
    kept: Tensor | None  # (B, H, L), what dropout multiplies them by
    attended: Tensor  # (H, B, C), weighted sums of x


def _forward(x, qkv_weight, qkv_bias, seed, num_heads, scale, dropout_p, dtype) -> _Forward:
    batch, layers, channels = x.shape
    x, weights = x.to(dtype), qkv_weight.to(dtype).reshape(3, num_heads, -1, channels)
    bias = None if qkv_bias is None else qkv_bias[:channels].to(dtype)
    q = F.linear(x[:, -1], weights[0].flatten(0, 1), bias) * scale
    q = q.unflatten(1, (num_heads, -1)).transpose(0, 1)
    absorbed = torch.bmm(q, weights[1]).transpose(0, 1)
    acc_dtype = torch.promote_types(dtype, torch.float32)
    probabilities = torch.bmm(absorbed, x.transpose(1, 2)).softmax(-1, dtype=acc_dtype)
    kept = None
    if dropout_p > 0.0:
        kept = keep_mask(seed, (batch, num_heads, 1, layers), dropout_p).squeeze(2).to(acc_dtype) / (1.0 - dropout_p)
    attended = torch.bmm(_dropped(probabilities, kept).to(dtype), x).transpose(0, 1)
    return _Forward(x, weights, q, absorbed, probabilities, kept, attended)


def _dropped(probabilities: Tensor, kept: Tensor | None) -> Tensor:
    return probabilities if kept is None else probabilities * kept


def lca_forward_cpu(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    scale: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> Tensor:
    """The result of ``ceit::lca``, its arguments checked; ``dtype`` is what matmuls take."""
    batch, _, channels = x.shape
    f = _forward(x, qkv_weight, qkv_bias, seed, num_heads, scale, dropout_p, dtype)
    out = torch.bmm(f.attended, f.weights[2].transpose(1, 2)).transpose(0, 1)  # (B, H, D)
    if qkv_bias is not None:
        bias = qkv_bias[2 * channels :].to(dtype).view(num_heads, -1)
        if f.kept is not None:  # v has the bias in it, and what is left of the probabilities does not sum to one
            bias = bias * (f.probabilities * f.kept).sum(-1, keepdim=True).to(dtype)
        out = out + bias
    return out.reshape(batch, 1, channels)


def lca_backward_cpu(
    grad_out: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    scale: float,
    dropout_p: float,
    dtype: torch.dtype,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, qkv_weight and qkv_bias that are needed, None for the others."""
    batch, _, channels = x.shape
    f = _forward(x, qkv_weight, qkv_bias, seed, num_heads, scale, dropout_p, dtype)
    grad_out = grad_out.to(dtype).reshape(batch, num_heads, -1)  # (B, H, D)
    by_head = grad_out.transpose(0, 1)
    d_attended = torch.bmm(by_head, f.weights[2]).transpose(0, 1)  # (B, H, C)
    d_scores = torch.bmm(d_attended, f.x.transpose(1, 2)).to(f.probabilities.dtype)  # (B, H, L)
    if f.kept is not None:
        if qkv_bias is not None:
            bias = qkv_bias[2 * channels :].to(dtype).view(num_heads, -1)
            d_scores = d_scores + (grad_out * bias).sum(-1, keepdim=True)
        d_scores = d_scores * f.kept
    d_scores = d_scores * f.probabilities
    d_scores = (d_scores - f.probabilities * d_scores.sum(-1, keepdim=True)).to(dtype)
    d_absorbed = torch.bmm(d_scores, f.x).transpose(0, 1)  # (H, B, C)
    d_q = torch.bmm(d_absorbed, f.weights[1].transpose(1, 2)).transpose(0, 1).reshape(batch, channels) * scale

    grad_x = grad_weight = grad_bias = None
    if need_input:
        by_token = torch.cat((_dropped(f.probabilities, f.kept).to(dtype), d_scores), 1).transpose(1, 2)  # (B, L, 2H)
        grad_x = torch.bmm(by_token, torch.cat((d_attended, f.absorbed), 1))
        grad_x[:, -1] += d_q @ f.weights[0].flatten(0, 1)
        grad_x = grad_x.to(x.dtype)
    if need_weight:
        d_k, d_v = torch.bmm(f.q.transpose(1, 2), d_absorbed), torch.bmm(by_head.transpose(1, 2), f.attended)
        grad_weight = torch.cat((d_q.t() @ f.x[:, -1], d_k.flatten(0, 1), d_v.flatten(0, 1))).to(qkv_weight.dtype)
    if need_weight and qkv_bias is not None:
        if f.kept is not None:
            grad_out = grad_out * (f.probabilities * f.kept).sum(-1, keepdim=True)
        d_bias = d_q.sum(0), d_q.new_zeros(channels), grad_out.flatten(1).sum(0)
        grad_bias = torch.cat([part.to(qkv_bias.dtype) for part in d_bias])
    return grad_x, grad_weight, grad_bias
