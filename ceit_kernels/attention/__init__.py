"""Multi-head self-attention, with compiled code on the CPU; elsewhere PyTorch's own is as fast."""

from .functional import self_attention
from .module import Attention, FusedAttention

__all__ = ["Attention", "FusedAttention", "self_attention"]
