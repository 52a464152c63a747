"""The locally-enhanced feed-forward block (LeFF)."""

from .module import FusedLeFF

__all__ = ["FusedLeFF"]
