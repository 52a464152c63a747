"""Class-token attention across layers on the CPU: few and small matmuls, by PyTorch's own.

W_k is multiplied into the query and W_v into the weighted sum of x, which takes 3 C^2 + 2 H L C multiply-adds an image
instead of (1 + 2 L) C^2 + 2 L C. The key's bias shifts every score of a head alike and drops out.

Scores, and what is weighted by them or their gradients, are in the dtype of sums: of tokens far from zero all scores
are large and nearly the same, and 16 bits would not tell them apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.philox import keep_mask

__all__ = ["lca_backward_cpu", "lca_forward_cpu"]


def lca_forward_cpu(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    scale: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of ``ceit::lca``, its arguments checked; ``dtype`` is what matmuls take.

    Returns:
        The result (B, 1, C), the queries (B, C), W_k multiplied into them (H, B, C), the probabilities (B, H, L) before
        dropout in the dtype of sums, and the sums of x that they weight (B, H, C).
    """
    batch, _, channels = x.shape
    x, weight, bias = _in_dtype(dtype, x, qkv_weight, qkv_bias)
    tokens = x.to(torch.promote_types(dtype, torch.float32))
    q = F.linear(x[:, -1], weight[:channels], None if bias is None else bias[:channels])
    by_head = q.view(batch, num_heads, -1).transpose(0, 1)  # (H, B, D)
    absorbed = torch.bmm(by_head, weight[channels : 2 * channels].view(num_heads, -1, channels))
    scores = torch.bmm(absorbed.transpose(0, 1).to(tokens.dtype), tokens.transpose(1, 2))
    probabilities = (scale * scores).softmax(-1)
    factor = _dropout_factor(probabilities, seed, dropout_p)
    kept = probabilities if factor is None else probabilities * factor
    attended = torch.bmm(kept, tokens).to(dtype)
    v_weight = weight[2 * channels :].view(num_heads, -1, channels)
    out = torch.bmm(attended.transpose(0, 1), v_weight.transpose(1, 2)).transpose(0, 1).reshape(batch, 1, channels)
    if bias is not None:
        bias = bias[2 * channels :]
        if dropout_p > 0.0:  # v has the bias in it, and what is left of the probabilities does not sum to one
            total = kept.sum(-1, keepdim=True).to(dtype)  # (B, H, 1)
            bias = (total * bias.view(num_heads, -1)).view(batch, 1, channels)
        out = out + bias
    return out, q, absorbed, probabilities, attended


def lca_backward_cpu(
    grad_out: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    seed: Tensor | None,
    q: Tensor,
    absorbed: Tensor,
    probabilities: Tensor,
    attended: Tensor,
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
    acc_dtype = probabilities.dtype
    tokens = x.to(acc_dtype)
    factor = _dropout_factor(probabilities, seed, dropout_p)
    kept = probabilities if factor is None else probabilities * factor
    q_weight, k_weight, v_weight = weight.view(3, num_heads, -1, channels).unbind(0)
    grad_out = grad_out.to(dtype).reshape(batch, num_heads, -1)  # (B, H, D)
    by_head = grad_out.transpose(0, 1)

    d_attended = torch.bmm(by_head, v_weight).transpose(0, 1).to(acc_dtype)  # (B, H, C)
    d_p = torch.bmm(d_attended, tokens.transpose(1, 2))  # (B, H, L)
    if factor is not None:
        if bias is not None:
            d_p = d_p + (grad_out * bias[2 * channels :].view(num_heads, -1)).sum(-1, keepdim=True)
        d_p = d_p * factor
    d_p = d_p - d_p[..., -1:]  # which are large and nearly the same too, and only differences count
    d_scores = scale * probabilities * (d_p - (probabilities * d_p).sum(-1, keepdim=True))
    d_absorbed = torch.bmm(d_scores, tokens).transpose(0, 1).to(dtype)  # (H, B, C)
    d_q = torch.bmm(d_absorbed, k_weight.transpose(1, 2)).transpose(0, 1).reshape(batch, channels)

    grad_x = grad_weight = grad_bias = None
    if need_input:
        by_token = torch.cat((kept, d_scores), 1).transpose(1, 2)  # (B, L, 2H)
        grad_x = torch.bmm(by_token, torch.cat((d_attended, absorbed.transpose(0, 1).to(acc_dtype)), 1))
        grad_x[:, -1] += d_q @ q_weight.reshape(channels, -1)
        grad_x = grad_x.to(x_dtype)
    if need_weight:
        d_k = torch.bmm(q.view(batch, num_heads, -1).permute(1, 2, 0), d_absorbed).view(channels, -1)
        d_v = torch.bmm(by_head.transpose(1, 2), attended.transpose(0, 1)).view(channels, -1)
        grad_weight = torch.cat((d_q.t() @ x[:, -1], d_k, d_v)).to(parameter_dtype)
    if need_weight and qkv_bias is not None:
        if dropout_p > 0.0:
            grad_out = grad_out * kept.sum(-1, keepdim=True)
        of_q = d_q.sum(0)
        d_bias = of_q, 0 * of_q, grad_out.flatten(1).sum(0)  # that of the keys is 0, or NaN as the others are
        grad_bias = torch.cat([part.to(qkv_bias.dtype) for part in d_bias])
    return grad_x, grad_weight, grad_bias


def _dropout_factor(probabilities: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    """What dropout multiplies probabilities (B, H, L) by; None where it does nothing."""
    if dropout_p == 0.0:
        return None
    batch, heads, layers = probabilities.shape
    return keep_mask(seed, (batch, heads, 1, layers), dropout_p).squeeze(2).to(probabilities.dtype) / (1.0 - dropout_p)


def _in_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous() for t in tensors]
