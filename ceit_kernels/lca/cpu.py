"""Class-token attention across layers on the CPU: few and small matmuls, by PyTorch's own.

W_k is multiplied into the query and W_v into the weighted sum of x, which takes 3 C^2 + 2 H L C multiply-adds an image
instead of (1 + 2 L) C^2 + 2 L C. The key's bias shifts every score of a head alike and drops out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.philox import keep_mask

__all__ = ["lca_backward_cpu", "lca_forward_cpu"]


def _probabilities(x, weight, bias, seed, num_heads, scale, dropout_p) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The scaled queries (H, B, D), W_k multiplied into them (B, H, C), and what dropout multiplies those by (B, H, L).

    With them the probabilities (B, H, L) before dropout, in the dtype of sums. x and parameters are of one dtype.
    """
    batch, layers, channels = x.shape
    q = F.linear(x[:, -1], weight[:channels], None if bias is None else bias[:channels]) * scale
    q = q.view(batch, num_heads, -1).transpose(0, 1)
    absorbed = torch.bmm(q, weight[channels : 2 * channels].view(num_heads, -1, channels)).transpose(0, 1)
    acc_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    probabilities = torch.bmm(absorbed, x.transpose(1, 2)).softmax(-1, dtype=acc_dtype)
    kept = None
    if dropout_p > 0.0:
        kept = keep_mask(seed, (batch, num_heads, 1, layers), dropout_p).squeeze(2).to(acc_dtype) / (1.0 - dropout_p)
    return q, absorbed, probabilities, kept


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
    x, weight, bias = _in_dtype(dtype, x, qkv_weight, qkv_bias)
    *_, probabilities, kept = _probabilities(x, weight, bias, seed, num_heads, scale, dropout_p)
    kept_probabilities = probabilities if kept is None else probabilities * kept
    attended = torch.bmm(kept_probabilities.to(dtype), x).transpose(0, 1)  # (H, B, C)
    v_weight = weight[2 * channels :].view(num_heads, -1, channels)
    out = torch.bmm(attended, v_weight.transpose(1, 2)).transpose(0, 1).reshape(batch, 1, channels)
    if bias is None:
        return out
    bias = bias[2 * channels :]
    if kept is not None:  # v has the bias in it, and what is left of the probabilities does not sum to one
        total = kept_probabilities.sum(-1, keepdim=True).to(dtype)  # (B, H, 1)
        bias = (total * bias.view(num_heads, -1)).view(batch, 1, channels)
    return out + bias


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
    x_dtype, parameter_dtype = x.dtype, qkv_weight.dtype
    x, weight, bias = _in_dtype(dtype, x, qkv_weight, qkv_bias)
    q, absorbed, probabilities, kept = _probabilities(x, weight, bias, seed, num_heads, scale, dropout_p)
    kept_probabilities = probabilities if kept is None else probabilities * kept
    _, k_weight, v_weight = weight.view(3, num_heads, -1, channels).unbind(0)
    grad_out = grad_out.to(dtype).reshape(batch, num_heads, -1)  # (B, H, D)
    by_head = grad_out.transpose(0, 1)

    d_attended = torch.bmm(by_head, v_weight).transpose(0, 1)  # (B, H, C)
    d_scores = torch.bmm(d_attended, x.transpose(1, 2)).to(probabilities.dtype)  # (B, H, L)
    if kept is not None and bias is not None:
        d_scores = d_scores + (grad_out * bias[2 * channels :].view(num_heads, -1)).sum(-1, keepdim=True)
    d_scores = d_scores * kept_probabilities
    d_scores = (d_scores - probabilities * d_scores.sum(-1, keepdim=True)).to(dtype)
    d_absorbed = torch.bmm(d_scores, x).transpose(0, 1)  # (H, B, C)
    d_q = torch.bmm(d_absorbed, k_weight.transpose(1, 2)).transpose(0, 1).reshape(batch, channels) * scale

    grad_x = grad_weight = grad_bias = None
    if need_input:
        by_token = torch.cat((kept_probabilities.to(dtype), d_scores), 1).transpose(1, 2)  # (B, L, 2H)
        grad_x = torch.bmm(by_token, torch.cat((d_attended, absorbed), 1))
        grad_x[:, -1] += d_q @ weight[:channels]
        grad_x = grad_x.to(x_dtype)
    if need_weight:
        attended = torch.bmm(kept_probabilities.to(dtype), x).transpose(0, 1)  # (H, B, C)
        d_k, d_v = torch.bmm(q.transpose(1, 2), d_absorbed), torch.bmm(by_head.transpose(1, 2), attended)
        grad_weight = torch.cat((d_q.t() @ x[:, -1], d_k.view(channels, -1), d_v.view(channels, -1)))
        grad_weight = grad_weight.to(parameter_dtype)
    if need_weight and bias is not None:
        if kept is not None:
            grad_out = grad_out * kept_probabilities.sum(-1, keepdim=True)
        d_bias = d_q.sum(0), d_q.new_zeros(channels), grad_out.flatten(1).sum(0)
        grad_bias = torch.cat([part.to(qkv_bias.dtype) for part in d_bias])
    return grad_x, grad_weight, grad_bias


def _in_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous() for t in tensors]
