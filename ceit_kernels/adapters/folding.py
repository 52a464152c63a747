"""Convolutions of other libraries with a norm behind them, which ``freeze`` makes one where no operator serves them."""

from __future__ import annotations

from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..common.calls import foreign_reason, functions_reason
from ..common.children import child_reason, is_patched, qualified_name
from ..leff.norms import folded, of_module
from .chains import chain_of

__all__ = ["fold_norms"]

# Of which all children are called, as of one within a class that is known.
_SEQUENCES = ("timm.models.tiny_vit.ConvNorm", "torchvision.ops.misc.Conv2dNormActivation")
_BATCH_NORM, _BATCH_NORM_ACT = (nn.BatchNorm2d,), ("timm.layers.norm_act.BatchNormAct2d",)


class _FoldedConvolution(nn.Conv2d):
    """Does what the norm behind it does, unless something was put in the place of the functions of either."""

    _apart: tuple[nn.Module, nn.Module]  # no children: nobody else is to call them

    def forward(self, input: Tensor) -> Tensor:
        return self._apart[0](input) if _are_called(*self._apart) else super().forward(input)


class _FoldedNorm(nn.Sequential):
    """What is left of a norm: its activation."""

    _apart: tuple[nn.Module, nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        return self._apart[1](input) if _are_called(*self._apart) else super().forward(input)

    def train(self, mode: bool = True) -> _FoldedNorm:
        return _refuse_training() if mode else super().train(False)


def _refuse_training() -> NoReturn:
    raise RuntimeError("a frozen model cannot be trained: the norm was folded into the convolution before it")


def _are_called(convolution: nn.Module, norm: nn.Module) -> bool:
    return functions_reason() is not None or is_patched(type(convolution)) or is_patched(type(norm))


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
    behind = (norm._modules[name] or nn.Identity() for name in ("drop", "act")) if with_activation else ()
    both, rest = folded(convolution, given), _FoldedNorm(*behind)
    both.__class__ = _FoldedConvolution
    for name, part in ((of_convolution, both), (of_norm, rest)):
        part.__dict__["_apart"] = convolution, norm
        module._modules[name] = part.eval()
