"""The layers of CeiT: image-to-tokens stem, LeFF, self-attention and LCA attention, plain and fused.

Source: Yuan et al., Incorporating Convolution Designs into Visual Transformers, ICCV 2021. They are in
``ceit_kernels``; each fused class is a subclass of its plain one.
"""

from torch import nn

from ceit_kernels.add_norm import AddNorm, FusedAddNorm
from ceit_kernels.attention import Attention, FusedAttention
from ceit_kernels.i2t import FusedImage2Tokens, Image2Tokens
from ceit_kernels.lca import FusedLCAAttention, LCAAttention
from ceit_kernels.leff import FusedLeFF, LocallyEnhancedFeedForward
from ceit_kernels.linear import FusedLinear, FusedPatchProjection, PatchProjection

__all__ = [
    "AddNorm",
    "Attention",
    "FusedAddNorm",
    "FusedAttention",
    "FusedImage2Tokens",
    "FusedLCAAttention",
    "FusedLeFF",
    "FusedLinear",
    "FusedPatchProjection",
    "Image2Tokens",
    "LCAAttention",
    "LocallyEnhancedFeedForward",
    "PatchProjection",
    "has_hooks",
]


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in hooks)
