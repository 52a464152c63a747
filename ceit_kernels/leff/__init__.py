"""The locally-enhanced feed-forward block (LeFF)."""

from .functional import leff_block
from .grid import token_grid
from .module import FusedLeFF
from .norms import BatchNorm

__all__ = ["BatchNorm", "FusedLeFF", "leff_block", "token_grid"]
