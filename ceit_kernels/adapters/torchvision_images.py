"""The inverted residual blocks of torchvision."""

from __future__ import annotations

from torch import nn

from ..leff.fusion import BlockParts
from .images import ImageBlockFusion

__all__ = ["MNASNetBlock", "MobileNetV2Block", "MobileNetV3Block"]

_CONV_NORM_ACTIVATION = ("torchvision.ops.misc.Conv2dNormActivation",)


class MobileNetV2Block(ImageBlockFusion):
    """``torchvision.models.mobilenetv2.InvertedResidual``."""

    parts = BlockParts(
        ("conv.0.0", "conv.1.0", "conv.2"),
        ("conv.0.1", "conv.1.1", "conv.3"),
        ("conv.0.2", "conv.1.2"),
        wrappers={"conv": (nn.Sequential,), **dict.fromkeys(("conv.0", "conv.1"), _CONV_NORM_ACTIVATION)},
    )
    adds_input = "use_res_connect"


class MobileNetV3Block(ImageBlockFusion):
    """``torchvision.models.mobilenetv3.InvertedResidual``."""

    parts = BlockParts(
        ("block.0.0", "block.1.0", "block.2.0"),
        ("block.0.1", "block.1.1", "block.2.1"),
        ("block.0.2", "block.1.2"),
        wrappers={
            "block": (nn.Sequential,),
            **dict.fromkeys(("block.0", "block.1", "block.2"), _CONV_NORM_ACTIVATION),
        },
    )
    adds_input, in_place = "use_res_connect", True


class MNASNetBlock(ImageBlockFusion):
    """``torchvision.models.mnasnet._InvertedResidual``."""

    parts = BlockParts(
        ("layers.0", "layers.3", "layers.6"),
        ("layers.1", "layers.4", "layers.7"),
        ("layers.2", "layers.5"),
        wrappers={"layers": (nn.Sequential,)},
    )
    adds_input = "apply_residual"
