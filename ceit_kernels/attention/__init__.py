"""Multi-head self-attention, with compiled code on the CPU; elsewhere PyTorch's own is as fast."""

from .module import Attention, FusedAttention
from .op import self_attention

__all__ = ["Attention", "FusedAttention", "self_attention"]
