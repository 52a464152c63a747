"""Multi-head self-attention in plain PyTorch: what the fused operator is checked against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention_reference"]


def attention_reference(
    qkv: Tensor,  # (B, N, 3 * H * D)
    num_heads: int,  # H
    scale: float,
    num_queries: int,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of the first ``num_queries`` tokens to all N.

    Returns:
        (B, num_queries, H * D), the heads side by side.
    """
    q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(2, (3, num_heads, -1)).unbind(2))  # (B, H, N, D) each
    out = F.scaled_dot_product_attention(q[:, :, :num_queries], k, v, dropout_p=dropout_p, scale=scale)
    return out.transpose(1, 2).flatten(2)
