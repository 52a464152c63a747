"""The layer-wise class-token attention (LCA)."""

from .module import FusedLCAAttention, LCAAttention
from .op import lca_attention

__all__ = ["FusedLCAAttention", "LCAAttention", "lca_attention"]
