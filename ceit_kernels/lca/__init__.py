"""The layer-wise class-token attention (LCA)."""

from .functional import lca_attention
from .module import FusedLCAAttention, LCAAttention

__all__ = ["FusedLCAAttention", "LCAAttention", "lca_attention"]
