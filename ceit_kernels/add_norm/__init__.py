"""A residual connection and the LayerNorm behind it, in one pass."""

from .module import AddNorm, FusedAddNorm
from .op import add_layer_norm

__all__ = ["AddNorm", "FusedAddNorm", "add_layer_norm"]
