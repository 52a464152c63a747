"""The feed-forward block of timm's PVTv2 (https://arxiv.org/abs/2106.13797)."""

from __future__ import annotations

from torch import Tensor, jit

from ..leff.fusion import BlockFusion, BlockParts
from ..linear.module import LINEAR

__all__ = ["MlpWithDepthwiseConv"]


class MlpWithDepthwiseConv(BlockFusion):
    """Linear, with linear attention a ReLU, depthwise 3x3, activation, linear."""

    parts = BlockParts(("fc1", "dwconv", "fc2"), activations=("relu", "act"), dropouts=("drop",), pointwise=LINEAR)

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        """x (B, H * W, C), feat_size [H, W] -> (B, H * W, O)."""
        if jit.is_scripting():
            return self._plain_forward(x, feat_size)
        return self._fused_forward(x, feat_size)

    @jit.unused
    def _fused_forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        out = self._by_operator(x, (feat_size[0], feat_size[1]))
        return super().forward(x, feat_size) if out is None else out
