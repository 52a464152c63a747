"""A residual connection and the LayerNorm behind it, in one pass."""

from .functional import add_layer_norm, add_norm
from .module import AddNorm, FusedAddNorm

__all__ = ["AddNorm", "FusedAddNorm", "add_layer_norm", "add_norm"]
