"""The module that a user drops in for class-token attention across layers."""

from __future__ import annotations

from torch import Tensor, nn

from ..attention import FusedAttention
from ..common.module import adopt
from ..linear import FusedLinear
from .op import lca_attention

__all__ = ["FusedLCAAttention"]


class FusedLCAAttention(FusedAttention):
    """Attention of the last layer's class token to the class tokens of all layers (CeiT, section 3.4), fused.

    Arguments, children and state_dict are those of ``FusedAttention``, of which it takes nothing else.
    """

    @classmethod
    def from_plain(cls, plain: nn.Module) -> FusedLCAAttention:
        """A fused module over the state of a plain one, which has ``num_heads``, ``scale`` and the same children."""
        return adopt(cls, plain, ("num_heads", "scale"), {"qkv": (nn.Linear, FusedLinear), "attn_drop": nn.Dropout})

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, C), the asking token last -> (B, 1, C)."""
        attention = lca_attention(
            x,
            self.qkv.weight,
            self.qkv.bias,
            num_heads=self.num_heads,
            scale=self.scale,
            dropout_p=self.attn_drop.p if self.attn_drop.training else 0.0,
        )
        return self.proj_drop(self.proj(attention))
