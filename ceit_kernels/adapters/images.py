"""What the inverted residual blocks of other libraries share: images in, images out, with or without a shortcut."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import backends
from ..common.autocast import autocast_dtype
from ..common.calls import foreign_reason, is_eager, needs_gradient, unsupported_reason
from ..common.children import IDENTITY, child_reason, held, qualified_name
from ..leff.cpu import kernels, leff_sizes
from ..leff.functional import pack
from ..leff.fusion import BlockFusion, child_at
from ..leff.grid import empty_tokens_like, from_tokens, is_planar, to_tokens

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
        foreign = foreign_reason(x)
        if foreign is not None:  # torch.fx's, of which nothing may be asked
            backends.leave_to_reference("leff", foreign)
            return super().forward(x)
        children, adds = self._modules, self._adds()
        drop_path = children.get(self.drop_child) if self.drop_child else None
        within = adds and _is_idle(drop_path) and not (self.in_place and autocast_dtype(x) not in (None, x.dtype))
        out = self._by_operator(x, residual=x if within else None, layout="NCHW")
        if out is None:
            return super().forward(x)
        if adds and not within:
            out = out if drop_path is None else drop_path(out)
            out = out.add_(x) if self.in_place else out + x
        return out if self.last_child is None else self.get_submodule(self.last_child)(out)

    def _adds(self) -> bool:
        adds = self.adds_input
        return getattr(self, adds) not in (None, False) if isinstance(adds, str) else adds

    def _kernel_stride(self) -> int:
        """As of ``BlockFusion``: 2 at inference on the CPU, without a shortcut."""
        depthwise: Any = child_at(self, self.parts.layers[1])
        if depthwise.stride != (2, 2) or self._adds() or held(depthwise, "weight").device.type != "cpu":
            return 1
        norms = [child_at(self, path) for path in self.parts.norms if path]
        return 1 if any(norm.training or getattr(norm, "running_mean", 0) is None for norm in norms) else 2

    def _strided(self, x: Tensor) -> Tensor | None:
        weights, biases, norms = self._tensors()
        parameters, weight = pack(weights, biases, norms), weights[0]
        reason = unsupported_reason(x, *parameters)
        if reason is None and (needs_gradient(x, *parameters) or not is_eager(x) or autocast_dtype(x) is not None):
            reason = "with a stride only eager calls without gradients and autocast are served"
        if reason is None and not (x.dim() == 4 and x.shape[1] == weight.shape[1] and x.numel()):
            reason = "the input is no batch of images of the block's channels"
        kinds = {(tensor.dtype, tensor.device) for tensor in (x, *parameters) if tensor is not None}
        if reason is None and len(kinds) > 1:
            reason = "images and parameters are of several dtypes or devices"
        if reason is not None:
            backends.leave_to_reference("leff", reason)
        if reason is not None or backends.choose("leff", x, x.dtype).backend != "native":
            return None
        tokens, (height, width) = to_tokens(x, weight.shape[1], "NCHW", 0, None)
        grid, sizes = (-(-height // 2), -(-width // 2)), leff_sizes(parameters, self._activations(), (height, width))
        eps = [0.0 if norm is None else norm.eps for norm in norms]
        out = empty_tokens_like(tokens, sizes[2], x.dtype, is_planar(tokens), grid[0] * grid[1])
        kernels._leff_infer(tokens, parameters, None, None, eps, [*sizes, 2], out)
        return from_tokens(out, "NCHW", grid, x)


def _is_idle(drop_path: nn.Module | None) -> bool:
    """Whether calling a child returns what it is given."""
    if drop_path is None:
        return True
    rate = _RATES.get(qualified_name(type(drop_path)))
    if rate is None:
        return child_reason("", drop_path, IDENTITY) is None
    idle = not drop_path.training or not getattr(drop_path, rate)
    return idle and child_reason("", drop_path, (type(drop_path),)) is None
