"""Modules of other libraries that compute what an operator does.

Known by name: neither this table nor what it names imports a library that the user has not imported.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import NamedTuple

from torch import nn

from ..common.children import is_patched, qualified_name
from ..common.module import Fusion, stand_in
from ..leff.fusion import BlockFusion, BlockParts
from ..linear.module import LINEAR

__all__ = ["ADAPTERS", "LINEAR", "Adapter", "BlockFusion", "BlockParts", "adapter_of"]


class Adapter(NamedTuple):
    """How a class is fused.

    Attributes:
        operator: one of ``OPERATORS``.
        fusion: what is put before the class, as ``stand_in`` takes it: a module of this folder, and its name there.
    """

    operator: str
    fusion: str

    def fused_class(self, plain_class: type[nn.Module]) -> type[Fusion]:
        """The fused class of a class that this is the adapter of."""
        return stand_in(plain_class, resolve_name(f"{__name__}.{self.fusion}"))


_EFFICIENTNET = "timm.models._efficientnet_blocks"
_SEGFORMER = "transformers.models.segformer.modeling_segformer"

# By the qualified names of classes: the names change with the libraries' versions.
ADAPTERS: dict[str, Adapter] = {
    f"{_SEGFORMER}.SegformerMixFFN": Adapter("leff", "transformers_mix_ffn:SegformerMixFFN"),
    f"{_SEGFORMER}.SegformerMixMLP": Adapter("leff", "transformers_mix_ffn:SegformerMixMLP"),
    f"{_SEGFORMER}.SegformerAttention": Adapter("attention", "transformers_segformer:SegformerAttention"),
    f"{_SEGFORMER}.SegformerDecodeHead": Adapter("linear", "transformers_segformer:SegformerDecodeHead"),
    "transformers.models.glpn.modeling_glpn.GLPNMixFFN": Adapter("leff", "transformers_mix_ffn:GLPNMixFFN"),
    "transformers.models.pvt_v2.modeling_pvt_v2.PvtV2ConvFeedForwardNetwork": Adapter(
        "leff", "transformers_mix_ffn:PvtV2ConvFeedForwardNetwork"
    ),
    "timm.layers.mlp.Mlp": Adapter("linear", "timm_mlp:Mlp"),
    "timm.models.pvt_v2.MlpWithDepthwiseConv": Adapter("leff", "timm_pvt_v2:MlpWithDepthwiseConv"),
    "timm.models.efficientformer_v2.ConvMlpWithNorm": Adapter("leff", "timm_images:ConvMlpWithNorm"),
    "timm.models.efficientformer_v2.Attention2d": Adapter("attention", "timm_attention:EfficientFormerAttention"),
    "timm.models.pvt_v2.Attention": Adapter("attention", "timm_attention:PVTv2Attention"),
    "timm.models.tiny_vit.Attention": Adapter("attention", "timm_attention:TinyViTAttention"),
    "timm.models.tiny_vit.MBConv": Adapter("leff", "timm_images:TinyViTMBConv"),
    "timm.models.tiny_vit.NormMlp": Adapter("linear", "timm_mlp:NormMlp"),
    "timm.models.tiny_vit.PatchMerging": Adapter("leff", "timm_images:TinyViTPatchMerging"),
    "timm.models.efficientvit_mit.MBConv": Adapter("leff", "timm_images:EfficientViTMBConv"),
    "timm.models.byobnet.BottleneckBlock": Adapter("leff", "timm_images:BottleneckBlock"),
    f"{_EFFICIENTNET}.InvertedResidual": Adapter("leff", "timm_images:InvertedResidual"),
    f"{_EFFICIENTNET}.UniversalInvertedResidual": Adapter("leff", "timm_images:UniversalInvertedResidual"),
    "torchvision.models.mobilenetv2.InvertedResidual": Adapter("leff", "torchvision_images:MobileNetV2Block"),
    "torchvision.models.mobilenetv3.InvertedResidual": Adapter("leff", "torchvision_images:MobileNetV3Block"),
    "torchvision.models.mnasnet._InvertedResidual": Adapter("leff", "torchvision_images:MNASNetBlock"),
}


def adapter_of(plain_class: type[nn.Module]) -> Adapter | None:
    """The adapter of exactly this class, if there is one; none where the class was given another ``forward``."""
    name = qualified_name(plain_class)
    adapter = ADAPTERS.get(name)
    own = adapter and qualified_name(plain_class.forward) == f"{name}.forward" and not is_patched(plain_class)
    return adapter if own else None
