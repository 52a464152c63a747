"""Class-token attention across layers on the CPU: few and small products, by PyTorch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.philox import keep_mask

__all__ = ["lca_attention_cpu"]


def lca_attention_cpu(
    x: Tensor,  # (B, L, C)
    qkv_weight: Tensor,  # (3C, C)
    qkv_bias: Tensor | None,  # (3C,)
    num_heads: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # int64 (1,), read where dropout_p > 0
) -> Tensor:
    """What ``lca_attention_reference`` computes, (B, 1, C), without keys and values.

    W_k is multiplied into the query and W_v into the weighted sum of x, which takes 4 C^2 + 2 H L C multiply-adds an
    image instead of (2 + 2 L) C^2. The key's bias shifts every score of a head alike and drops out.
    """
    batch, layers, channels = x.shape
    weight_q, weight_k, weight_v = qkv_weight.unflatten(0, (3, channels)).unbind(0)
    bias_q = bias_v = None
    if qkv_bias is not None:
        bias_q, _, bias_v = qkv_bias.unflatten(0, (3, channels)).unbind(0)

    q = (F.linear(x[:, -1], weight_q, bias_q) * scale).unflatten(1, (num_heads, -1)).transpose(0, 1)  # (H, B, D)
    absorbed = torch.bmm(q, weight_k.unflatten(0, (num_heads, -1))).transpose(0, 1)  # (B, H, C)
    probabilities = torch.bmm(absorbed, x.transpose(1, 2)).softmax(dim=-1)  # (B, H, L)
    if dropout_p > 0.0:
        keep = keep_mask(seed, (batch, num_heads, 1, layers), dropout_p).squeeze(2)
        probabilities = probabilities * keep / (1.0 - dropout_p)
    attended = torch.bmm(probabilities, x).transpose(0, 1)  # (H, B, C)
    out = torch.bmm(attended, weight_v.unflatten(0, (num_heads, -1)).transpose(1, 2))  # (H, B, D)
    out = out.transpose(0, 1).reshape(batch, 1, channels)
    if bias_v is None:
        return out
    bias = bias_v.to(out.dtype)
    if dropout_p > 0.0:  # v has the bias in it, and what is left of the probabilities does not sum to one
        total = probabilities.sum(-1, keepdim=True)  # (B, H, 1)
        bias = (total * bias.unflatten(0, (num_heads, -1))).reshape(batch, 1, channels)
    return out + bias
