"""What the inverted residual blocks of other libraries share: images in, images out, with or without a shortcut."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..common.autocast import autocast_dtype
from ..common.children import IDENTITY, child_reason, qualified_name
from ..leff.fusion import BlockFusion

__all__ = ["ImageBlockFusion"]

# Where classes that drop the residual path of whole images keep their rate.
_RATES = {"timm.layers.drop.DropPath": "drop_prob", "torchvision.ops.stochastic_depth.StochasticDepth": "p"}


class ImageBlockFusion(BlockFusion):
    """``forward`` of a block on images (B, C, H, W): its three layers, plus the input, then an activation.

    Attributes:
        adds_input: whether the input is added to the layers' result, or the attribute that says so: False or None where
            it is not.
        drop_child: the child that the result of the layers passes before the input is added to it.
        in_place: whether the input is added in place, so that the sum has the dtype of the layers' result.
        last_child: the child that is called last.
    """

    adds_input: ClassVar[bool | str] = False
    drop_child: ClassVar[str | None] = None
    in_place: ClassVar[bool] = False
    last_child: ClassVar[str | None] = None

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, O, H, W), in memory as x is; errors as of ``leff_block``."""
        if torch.jit.is_scripting():
            return self._plain_forward(x)
        return self._fused_forward(x)

    @torch.jit.unused
    def _fused_forward(self, x: Tensor) -> Tensor:
        children, adds = self._modules, self.adds_input
        adds = getattr(self, adds) not in (None, False) if isinstance(adds, str) else adds
        drop_path = children.get(self.drop_child) if self.drop_child else None
        within = adds and _is_idle(drop_path) and not (self.in_place and autocast_dtype(x) not in (None, x.dtype))
        out = self._by_operator(x, residual=x if within else None, layout="NCHW")
        if out is None:
            return super().forward(x)
        if adds and not within:
            out = out if drop_path is None else drop_path(out)
            out = out.add_(x) if self.in_place else out + x
        return out if self.last_child is None else self.get_submodule(self.last_child)(out)


def _is_idle(drop_path: nn.Module | None) -> bool:
    """Whether calling a child returns what it is given."""
    if drop_path is None:
        return True
    rate = _RATES.get(qualified_name(type(drop_path)))
    if rate is None:
        return child_reason("", drop_path, IDENTITY) is None
    idle = not drop_path.training or not getattr(drop_path, rate)
    return idle and child_reason("", drop_path, (type(drop_path),)) is None
