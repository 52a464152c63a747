"""Multi-head self-attention, with compiled code on the CPU; elsewhere PyTorch's own is as fast."""

from .module import FusedAttention
from .op import self_attention

__all__ = ["FusedAttention", "self_attention"]
