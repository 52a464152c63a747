"""Mix-FFN of transformers (SegFormer, https://arxiv.org/abs/2105.15203; GLPN; PVTv2, https://arxiv.org/abs/2106.13797).

A linear layer, a depthwise 3x3 convolution over the image that the tokens make, an activation, a linear layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..leff.fusion import BlockFusion, BlockParts
from ..linear.module import LINEAR

__all__ = ["GLPNMixFFN", "PvtV2ConvFeedForwardNetwork", "SegformerMixFFN", "SegformerMixMLP"]


class _MixFFN(BlockFusion):
    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        """hidden_states (B, height * width, C) -> (B, height * width, O)."""
        out = self._by_operator(hidden_states, (height, width))
        return super().forward(hidden_states, height, width) if out is None else out


def _parts(
    model: str, *wrappers: str, names: tuple[str, str, str] = ("dense1", "intermediate_act_fn", "dense2"), **parts: Any
) -> BlockParts:
    return BlockParts(
        (names[0], "dwconv.dwconv", names[2]),
        dropouts=("dropout",),
        wrappers={"dwconv": [f"transformers.models.{model}.modeling_{model}.{name}" for name in wrappers]},
        pointwise=LINEAR,
        **{"activations": (None, names[1]), **parts},
    )


class SegformerMixFFN(_MixFFN):
    """SegFormer's."""

    parts = _parts("segformer", "SegformerDWConv", "SegformerDepthWiseConv")


class SegformerMixMLP(_MixFFN):
    """SegFormer's, as later versions have it."""

    parts = _parts("segformer", "SegformerDepthWiseConv", names=("fc1", "activation_fn", "fc2"))


class GLPNMixFFN(_MixFFN):
    """GLPN's."""

    parts = _parts("glpn", "GLPNDWConv", "GLPNDepthWiseConv")


class PvtV2ConvFeedForwardNetwork(_MixFFN):
    """PVTv2's; with linear attention a ReLU follows the first layer too."""

    parts = _parts("pvt_v2", "PvtV2DepthWiseConv", activations=("relu", "intermediate_act_fn"))
