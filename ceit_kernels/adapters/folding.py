"""Convolutions of other libraries with a norm behind them, which ``freeze`` makes one where no operator serves them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from ..common.calls import foreign_reason
from ..common.children import child_reason, qualified_name
from ..leff.norms import folded, of_module
from .chains import chain_of

__all__ = ["fold_norms"]

# Of which all children are called, as of one within a class that is known.
_SEQUENCES = ("timm.models.tiny_vit.ConvNorm", "torchvision.ops.misc.Conv2dNormActivation")
_BATCH_NORM, _BATCH_NORM_ACT = (nn.BatchNorm2d,), ("timm.layers.norm_act.BatchNormAct2d",)


def fold_norms(module: nn.Module, within: bool) -> bool:
    """Fold norms into copies of the convolutions before them, of a module's children in a snapshot in evaluation mode.

    Args:
        module: none that an operator serves.
        within: whether its parent is of a class that is known, which calls all of a Sequential.

    Returns:
        Whether its own class is.
    """
    chain = chain_of(module)
    if chain is not None and isinstance(module, nn.Sequential):
        chain = chain if within or qualified_name(type(module)) in _SEQUENCES else None
    for pair in pairwise(chain.children if chain else ()):
        _fold(module, *pair)
    return chain is not None


def _fold(module: nn.Module, of_convolution: str, of_norm: str) -> None:
    convolution, norm = module._modules.get(of_convolution), module._modules.get(of_norm)
    if not isinstance(convolution, nn.Conv2d) or norm is None:
        return
    if child_reason(of_convolution, convolution, (nn.Conv2d,)) is not None:
        return
    with_activation = child_reason(of_norm, norm, _BATCH_NORM_ACT) is None
    if not with_activation and child_reason(of_norm, norm, _BATCH_NORM) is not None:
        return
    given = of_module(norm)
    if given is None or given.training or convolution.weight.dtype not in (torch.float32, torch.float64):
        return
    if foreign_reason(*convolution.buffers(), *norm.buffers()) is not None:
        return
    module._modules[of_convolution] = folded(convolution, given)
    behind = (norm._modules[name] or nn.Identity() for name in ("drop", "act")) if with_activation else ()
    module._modules[of_norm] = nn.Sequential(*behind) if with_activation else nn.Identity()
