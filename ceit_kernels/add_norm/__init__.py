"""A residual connection and the LayerNorm behind it, in one pass."""

from .module import FusedAddNorm
from .op import add_layer_norm

__all__ = ["FusedAddNorm", "add_layer_norm"]
