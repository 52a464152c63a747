"""The module that a user drops in for multi-head self-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..common.module import adopt
from .op import self_attention

__all__ = ["FusedAttention"]


class FusedAttention(nn.Module):
    """Multi-head self-attention of ViT (CeiT, section 3.1), fused on the CPU.

    Constructor, children and state_dict are the plain module's (``qkv``, ``attn_drop``, ``proj``, ``proj_drop``).

    Args:
        dim: channels C of a token, a multiple of ``num_heads``.
        num_heads: heads H.
        qkv_bias: give the query, key and value projections a bias.
        qk_scale: factor of the scores, by default ``(C / H) ** -0.5``.
        attn_drop: probability of dropping an attention weight, in [0, 1).
        proj_drop: probability of dropping an output channel.

    Raises:
        ValueError: ``num_heads`` is no divisor of ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim={dim}, got {num_heads}")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def from_plain(cls, plain: nn.Module) -> FusedAttention:
        """A fused module over the state of a plain one, which has ``num_heads``, ``scale`` and the same children."""
        return adopt(cls, plain, ("num_heads", "scale", "qkv", "proj", "proj_drop"), {"attn_drop": nn.Dropout})

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """x (B, N, C) -> (B, num_queries, C): the first ``num_queries`` tokens, or all, attend to all.

        Raises:
            ValueError, TypeError, BackendError: as ``self_attention``.
        """
        return self._attend(self.qkv(x), num_queries)

    def forward_first(self, x: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
        """What ``forward`` returns for all tokens, without a gradient, and for the first ``num_queries``, with theirs.

        For tokens of which the others count for statistics alone: a gradient that is zero is not computed.

        Raises:
            ValueError: for dropout, whose draws would differ.
        """
        if self.training and (self.attn_drop.p or self.proj_drop.p):
            raise ValueError(f"attn_drop, proj_drop: expected none, got {self.attn_drop.p} and {self.proj_drop.p}")
        qkv = self.qkv(x)
        with torch.no_grad():
            every = self._attend(qkv, None)
        return every, self._attend(qkv, num_queries)

    def _attend(self, qkv: Tensor, num_queries: int | None) -> Tensor:
        attention = self_attention(
            qkv,
            num_heads=self.num_heads,
            scale=self.scale,
            num_queries=num_queries,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        return self.proj_drop(self.proj(attention))

    def extra_repr(self) -> str:
        """What ``print`` shows beside the children."""
        return f"num_heads={self.num_heads}, scale={self.scale:.4g}"
