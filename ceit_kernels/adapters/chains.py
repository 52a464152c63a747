"""Modules of other libraries that call their children one after another, which ``freeze`` makes one call of."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..common.children import has_own, is_patched, qualified_name
from ..common.module import Fusion

__all__ = ["Chain", "chain_of"]


class Chain(NamedTuple):
    """What a module's ``forward`` does.

    Attributes:
        children: are called in this order; those that are missing or None are left out.
        adds_input: whether the input is added to their result, or the attribute that says so: False or None where it is
            not.
        drop_child: the child that the result passes before the input is added to it.
        behind: the children that are called after that.
        method: that does it; of a whole model not all children belong to it.
        then: the children that it calls with the result, whatever they compute.
        of_images: the children that are called with the image that the tokens are.
        gate: the child that the result of the others passes to multiply the input (squeeze-and-excitation): these take
            the mean over the pixels.
        pool: the child that takes that mean, if one does.
    """

    children: tuple[str, ...]
    adds_input: bool | str = False
    drop_child: str | None = None
    behind: tuple[str, ...] = ()
    method: str = "forward"
    then: tuple[str, ...] = ()
    of_images: tuple[str, ...] = ()
    gate: str | None = None
    pool: str | None = None


_EFFICIENTNET = "timm.models._efficientnet_blocks"
_SEGFORMER = "transformers.models.segformer.modeling_segformer"
_SKIP = "has_skip", "drop_path"
_WHOLE = Chain(("conv_stem", "bn1", "blocks", "conv_head", "bn2"), method="forward_features")

# By the qualified name of a class.
_CHAINS: dict[str, Chain] = {
    "timm.layers.classifier.NormMlpClassifierHead": Chain(
        ("global_pool", "norm", "flatten", "pre_logits", "drop", "fc")
    ),
    "timm.layers.mlp.Mlp": Chain(("fc1", "act", "drop1", "norm", "fc2", "drop2")),
    "timm.layers.conv_bn_act.ConvNormAct": Chain(("conv", "bn", "aa")),
    "timm.layers.squeeze_excite.SEModule": Chain(("fc1", "bn", "act", "fc2"), gate="gate"),
    f"{_EFFICIENTNET}.SqueezeExcite": Chain(("conv_reduce", "act1", "conv_expand"), gate="gate"),
    f"{_EFFICIENTNET}.ConvBnAct": Chain(("conv", "bn1", "aa"), *_SKIP),
    f"{_EFFICIENTNET}.DepthwiseSeparableConv": Chain(("conv_dw", "bn1", "aa", "se", "conv_pw", "bn2"), *_SKIP),
    f"{_EFFICIENTNET}.EdgeResidual": Chain(("conv_exp", "bn1", "aa", "se", "conv_pwl", "bn2"), *_SKIP),
    f"{_EFFICIENTNET}.InvertedResidual": Chain(
        ("conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl", "bn3"), *_SKIP
    ),
    f"{_EFFICIENTNET}.UniversalInvertedResidual": Chain(
        ("dw_start", "pw_exp", "dw_mid", "se", "pw_proj", "dw_end", "layer_scale"), *_SKIP
    ),
    "timm.models.byobnet.BottleneckBlock": Chain(
        ("conv1_1x1", "conv2_kxk", "conv2b_kxk", "attn", "conv3_1x1", "attn_last"), "shortcut", "drop_path", ("act",)
    ),
    "timm.models.efficientformer_v2.ConvNorm": Chain(("conv", "bn")),
    "timm.models.efficientformer_v2.ConvMlpWithNorm": Chain(("fc1", "mid", "drop1", "fc2", "drop2")),
    "timm.models.efficientformer_v2.EfficientFormerV2": Chain(
        ("stem", "stages"), method="forward_features", then=("norm",)
    ),
    "timm.models.efficientformer_v2.EfficientFormerV2Stage": Chain(("downsample", "blocks")),
    "timm.models.efficientnet.EfficientNet": _WHOLE,
    "timm.models.efficientvit_mit.ConvNormAct": Chain(("dropout", "conv", "norm", "act")),
    "timm.models.efficientvit_mit.DSConv": Chain(("depth_conv", "point_conv")),
    "timm.models.efficientvit_mit.MBConv": Chain(("inverted_conv", "depth_conv", "point_conv")),
    "timm.models.mobilenetv3.MobileNetV3": Chain(_WHOLE.children[:3], method="forward_features"),
    "timm.models.pvt_v2.MlpWithDepthwiseConv": Chain(
        ("fc1", "relu", "dwconv", "act", "drop", "fc2"), of_images=("dwconv",)
    ),
    "timm.models.pvt_v2.PyramidVisionTransformerV2": Chain(("patch_embed", "stages"), method="forward_features"),
    "timm.models.tiny_vit.ConvLayer": Chain(("blocks",)),
    "timm.models.tiny_vit.MBConv": Chain(("conv1", "act1", "conv2", "act2", "conv3"), True, "drop_path", ("act3",)),
    "timm.models.tiny_vit.NormMlp": Chain(("norm", "fc1", "act", "drop1", "fc2", "drop2")),
    "timm.models.tiny_vit.PatchEmbed": Chain(("conv1", "act", "conv2")),
    "timm.models.tiny_vit.PatchMerging": Chain(("conv1", "act1", "conv2", "act2", "conv3")),
    "timm.models.tiny_vit.TinyVit": Chain(("patch_embed", "stages"), method="forward_features"),
    "torchvision.models.efficientnet.MBConv": Chain(("block",), "use_res_connect", "stochastic_depth"),
    "torchvision.models.efficientnet.FusedMBConv": Chain(("block",), "use_res_connect", "stochastic_depth"),
    "torchvision.models.mobilenetv2.InvertedResidual": Chain(("conv",), "use_res_connect"),
    "torchvision.models.mobilenetv3.InvertedResidual": Chain(("block",), "use_res_connect"),
    "torchvision.models.mnasnet._InvertedResidual": Chain(("layers",), "apply_residual"),
    "torchvision.ops.misc.SqueezeExcitation": Chain(
        ("fc1", "activation", "fc2"), gate="scale_activation", pool="avgpool"
    ),
    f"{_SEGFORMER}.SegformerDepthWiseConv": Chain(("dwconv",)),
    f"{_SEGFORMER}.SegformerMixMLP": Chain(("fc1", "dwconv", "activation_fn", "fc2"), of_images=("dwconv",)),
}


def chain_of(module: nn.Module) -> Chain | None:
    """What a module does, by the class that it has or was fused from; None where that is not known."""
    found: type[nn.Module] = type(module).plain_class if isinstance(module, Fusion) else type(module)
    if found.forward is nn.Sequential.forward:
        return None if "forward" in vars(module) or is_patched(found) else Chain(tuple(module._modules))
    name = qualified_name(found)
    chain = _CHAINS.get(name)
    if chain is None or chain.method in vars(module):
        return None
    own = qualified_name(getattr(found, chain.method)) == f"{name}.{chain.method}" and has_own(found, chain.method)
    return chain if own else None
