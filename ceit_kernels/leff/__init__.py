"""The locally-enhanced feed-forward block (LeFF)."""

from .functional import leff_block
from .grid import token_grid
from .module import FrozenLeFF, FusedLeFF, LocallyEnhancedFeedForward, update_statistics
from .norms import BatchNorm

__all__ = [
    "BatchNorm",
    "FrozenLeFF",
    "FusedLeFF",
    "LocallyEnhancedFeedForward",
    "leff_block",
    "token_grid",
    "update_statistics",
]
