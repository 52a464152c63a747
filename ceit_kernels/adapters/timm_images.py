"""The inverted residual blocks of timm's convolutional and hybrid models."""

from __future__ import annotations

from ..common.children import ANY, IDENTITY
from ..leff.fusion import BlockParts
from .images import ImageBlockFusion

__all__ = [
    "BottleneckBlock",
    "ConvMlpWithNorm",
    "EfficientViTMBConv",
    "InvertedResidual",
    "TinyViTMBConv",
    "TinyViTPatchMerging",
    "UniversalInvertedResidual",
]

_CONV_NORM_ACT = ("timm.layers.conv_bn_act.ConvNormAct",)


class ConvMlpWithNorm(ImageBlockFusion):
    """``timm.models.efficientformer_v2.ConvMlpWithNorm``; layer scale and shortcut are the model's."""

    parts = BlockParts(
        ("fc1.conv", "mid.conv", "fc2.conv"),
        ("fc1.bn", "mid.bn", "fc2.bn"),
        ("fc1.bn.act", "mid.bn.act"),
        ("drop1", "drop2"),
        {"fc1": _CONV_NORM_ACT, "mid": _CONV_NORM_ACT, "fc2": ("timm.models.efficientformer_v2.ConvNorm",)},
    )


class TinyViTMBConv(ImageBlockFusion):
    """``timm.models.tiny_vit.MBConv``, whose last activation follows the shortcut."""

    parts = BlockParts(
        ("conv1.conv", "conv2.conv", "conv3.conv"),
        ("conv1.bn", "conv2.bn", "conv3.bn"),
        ("act1", "act2"),
        wrappers={
            **dict.fromkeys(("conv1", "conv2", "conv3"), ("timm.models.tiny_vit.ConvNorm",)),
            **dict.fromkeys(("drop_path", "act3"), ANY),
        },
    )
    adds_input, drop_child, in_place, last_child = True, "drop_path", True, "act3"


class TinyViTPatchMerging(ImageBlockFusion):
    """``timm.models.tiny_vit.PatchMerging``, whose stride the kernels have at inference."""

    parts = BlockParts(
        ("conv1.conv", "conv2.conv", "conv3.conv"),
        ("conv1.bn", "conv2.bn", "conv3.bn"),
        ("act1", "act2"),
        wrappers=dict.fromkeys(("conv1", "conv2", "conv3"), ("timm.models.tiny_vit.ConvNorm",)),
    )


class InvertedResidual(ImageBlockFusion):
    """``timm.models._efficientnet_blocks.InvertedResidual`` of MobileNet, EfficientNet and many others."""

    parts = BlockParts(
        ("conv_pw", "conv_dw", "conv_pwl"),
        ("bn1", "bn2", "bn3"),
        ("bn1.act", "bn2.act"),
        wrappers={"drop_path": ANY, "bn3.act": IDENTITY},
    )
    adds_input, drop_child = "has_skip", "drop_path"


class UniversalInvertedResidual(InvertedResidual):
    """``timm.models._efficientnet_blocks.UniversalInvertedResidual`` of MobileNetV4."""

    parts = BlockParts(
        ("pw_exp.conv", "dw_mid.conv", "pw_proj.conv"),
        ("pw_exp.bn", "dw_mid.bn", "pw_proj.bn"),
        ("pw_exp.bn.act", "dw_mid.bn.act"),
        wrappers={
            **dict.fromkeys(("pw_exp", "dw_mid", "pw_proj"), _CONV_NORM_ACT),
            "drop_path": ANY,
            "pw_proj.bn.act": IDENTITY,
        },
    )


class BottleneckBlock(ImageBlockFusion):
    """``timm.models.byobnet.BottleneckBlock``, with a depthwise convolution that of MobileViT."""

    parts = BlockParts(
        ("conv1_1x1.conv", "conv2_kxk.conv", "conv3_1x1.conv"),
        ("conv1_1x1.bn", "conv2_kxk.bn", "conv3_1x1.bn"),
        ("conv1_1x1.bn.act", "conv2_kxk.bn.act"),
        wrappers={
            **dict.fromkeys(("conv1_1x1", "conv2_kxk", "conv3_1x1"), _CONV_NORM_ACT),
            **dict.fromkeys(("drop_path", "act"), ANY),
            "conv3_1x1.bn.act": IDENTITY,
        },
    )
    adds_input, drop_child, last_child = "shortcut", "drop_path", "act"


class EfficientViTMBConv(ImageBlockFusion):
    """``timm.models.efficientvit_mit.MBConv``, with norms or biases; the shortcut is the model's."""

    parts = BlockParts(
        ("inverted_conv.conv", "depth_conv.conv", "point_conv.conv"),
        ("inverted_conv.norm", "depth_conv.norm", "point_conv.norm"),
        ("inverted_conv.act", "depth_conv.act"),
        ("inverted_conv.dropout", "depth_conv.dropout", "point_conv.dropout"),
        dict.fromkeys(("inverted_conv", "depth_conv", "point_conv"), ("timm.models.efficientvit_mit.ConvNormAct",)),
    )
