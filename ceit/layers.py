"""The building blocks of CeiT in plain PyTorch: image-to-tokens stem, LeFF, self-attention and LCA attention.

Source: Yuan et al., Incorporating Convolution Designs into Visual Transformers, ICCV 2021. ``ceit_kernels`` has them,
beside the fused modules that are subclasses of them.
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
    "is_watched",
]


def is_watched(module: nn.Module) -> bool:
    """Whether someone has hooked a module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in hooks)
