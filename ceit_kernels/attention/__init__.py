"""Multi-head self-attention, with compiled code on the CPU; on a GPU around PyTorch's own."""

from .functional import self_attention
from .module import Attention, FusedAttention

__all__ = ["Attention", "FusedAttention", "self_attention"]
