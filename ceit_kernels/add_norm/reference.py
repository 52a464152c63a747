"""A residual connection and the LayerNorm behind it in plain PyTorch: what the fused operator is checked against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_norm_reference", "prefix_of"]


def add_norm_reference(
    x: Tensor,  # (..., C)
    branch: Tensor | None,  # (..., C)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``x + branch`` and its LayerNorm (Ba et al., 2016) over the channels."""
    total = x if branch is None else x + branch
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def prefix_of(total: Tensor, num_prefix_tokens: int) -> Tensor:
    """The first tokens of (B, N, C), the last if the number is negative."""
    return total[:, :num_prefix_tokens] if num_prefix_tokens >= 0 else total[:, num_prefix_tokens:]
