"""Linear layers at inference on the CPU, by oneDNN with weights packed once; elsewhere PyTorch's own is as fast."""

from .module import FusedLinear

__all__ = ["FusedLinear"]
