"""Linear layers on the CPU, by oneDNN with weights packed once; elsewhere PyTorch's own is the fastest already."""

from .module import FusedLinear

__all__ = ["FusedLinear"]
