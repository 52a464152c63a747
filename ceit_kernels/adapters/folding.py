"""Convolutions of other libraries with a norm behind them, which ``freeze`` makes one where no operator serves them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from ..common.children import child_reason, qualified_name
from ..common.module import Fusion
from ..leff.norms import folded, of_module

__all__ = ["fold_norms"]

_EFFICIENTNET = "timm.models._efficientnet_blocks"

# Children that a class calls one right after the other, by its qualified name.
_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "timm.layers.conv_bn_act.ConvNormAct": (("conv", "bn"),),
    f"{_EFFICIENTNET}.ConvBnAct": (("conv", "bn1"),),
    f"{_EFFICIENTNET}.DepthwiseSeparableConv": (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    f"{_EFFICIENTNET}.EdgeResidual": (("conv_exp", "bn1"), ("conv_pwl", "bn2")),
    f"{_EFFICIENTNET}.InvertedResidual": (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
    "timm.models.efficientformer_v2.ConvNorm": (("conv", "bn"),),
    "timm.models.efficientnet.EfficientNet": (("conv_stem", "bn1"), ("conv_head", "bn2")),
    "timm.models.efficientvit_mit.ConvNormAct": (("conv", "norm"),),
    "timm.models.mobilenetv3.MobileNetV3": (("conv_stem", "bn1"),),
}
_SEQUENCES = ("timm.models.tiny_vit.ConvNorm", "torchvision.ops.misc.Conv2dNormActivation")
_SEQUENTIAL = "torch.nn.modules.container.Sequential.forward"
_BATCH_NORM, _BATCH_NORM_ACT = (nn.BatchNorm2d,), ("timm.layers.norm_act.BatchNormAct2d",)


def fold_norms(model: nn.Module, within: bool = False) -> None:
    """Fold norms into copies of the convolutions before them, in a snapshot in evaluation mode.

    Args:
        model: in which blocks that an operator serves are left alone.
        within: whether its parent is a class known here, which calls all of a Sequential.
    """
    fused = isinstance(model, Fusion)
    if fused and model.plain_reason() is None:
        return
    found = type(model).plain_class if fused else type(model)
    name = qualified_name(found)
    if "forward" not in vars(model) and qualified_name(found.forward) in (f"{name}.forward", _SEQUENTIAL):
        sequential = name in _SEQUENCES or (within and found is nn.Sequential)
        for pair in pairwise(model._modules) if sequential else _PAIRS.get(name, ()):
            _fold(model, *pair)
    for child in model.children():
        fold_norms(child, fused)


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
    module._modules[of_convolution] = folded(convolution, given)
    module._modules[of_norm] = nn.Sequential(*norm.children()) if with_activation else nn.Identity()
