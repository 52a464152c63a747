"""The locally-enhanced feed-forward block (LeFF)."""

from .grid import token_grid
from .module import FusedLeFF

__all__ = ["FusedLeFF", "token_grid"]
