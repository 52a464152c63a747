"""Linear layers on the CPU, by oneDNN, at inference with weights packed once; elsewhere PyTorch's own is as fast."""

from .module import FusedLinear
from .patches import FusedPatchProjection

__all__ = ["FusedLinear", "FusedPatchProjection"]
