"""Class-token attention across layers in plain PyTorch: what the fused operator is checked against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..common.philox import keep_mask

__all__ = ["lca_reference"]


def lca_reference(
    x: Tensor,  # (B, L, C)
    qkv_weight: Tensor,  # (3C, C)
    qkv_bias: Tensor | None,  # (3C,)
    num_heads: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # int64 (1,), read where dropout_p > 0
) -> Tensor:
    """Attention of the last of L class tokens to all of them (Yuan et al., ICCV 2021, section 3.4).

    Returns:
        (B, 1, C), the heads side by side, before the output projection.
    """
    batch, layers, channels = x.shape
    weight_q, weight_kv = qkv_weight.split([channels, 2 * channels])
    bias_q, bias_kv = (None, None) if qkv_bias is None else qkv_bias.split([channels, 2 * channels])

    q = F.linear(x[:, -1:], weight_q, bias_q).unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, H, 1, D)
    kv = F.linear(x, weight_kv, bias_kv).unflatten(-1, (2, num_heads, -1))
    k, v = kv.permute(2, 0, 3, 1, 4)  # (B, H, L, D) each

    probabilities = (q @ k.transpose(-2, -1) * scale).softmax(dim=-1)  # (B, H, 1, L)
    if dropout_p > 0.0:
        keep = keep_mask(seed, (batch, num_heads, 1, layers), dropout_p)
        probabilities = probabilities * keep / (1.0 - dropout_p)
    return (probabilities @ v).transpose(1, 2).reshape(batch, 1, channels)
