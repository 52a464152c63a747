"""Linear layers on the CPU, by this project's GEMM; elsewhere PyTorch's own is as fast."""

from .module import FrozenLinear, FusedLinear
from .patches import FusedPatchProjection, PatchProjection

__all__ = ["FrozenLinear", "FusedLinear", "FusedPatchProjection", "PatchProjection"]
