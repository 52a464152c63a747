"""The layer-wise class-token attention (LCA)."""

from .module import FusedLCAAttention
from .op import lca_attention

__all__ = ["FusedLCAAttention", "lca_attention"]
