"""The module that a user drops in for a projection of patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends
from ..common.autocast import autocast_dtype
from ..common.calls import foreign_reason, unsupported_reason
from ..common.checks import check_input
from ..common.children import children_reason, convolution_reason, declare_methods
from ..common.module import Fusion, attributes_of
from .functional import linear_layer

__all__ = ["FusedPatchProjection", "PatchProjection"]


class PatchProjection(nn.Conv2d):
    """Linear projection of patches that lie side by side: a convolution with a stride of the kernel's size."""


declare_methods(PatchProjection, "_conv_forward")


class PatchProjectionFusion(Fusion, attributes_of(PatchProjection)):
    """``forward`` of a convolution whose patches do not overlap, as a linear layer of patches on the CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) -> (B, out_channels, H // stride, W // stride), on the CPU channels-last.

        Pixels beyond the last whole patch are dropped. A map in channels-last memory is read as it lies.

        Raises:
            ValueError, TypeError: the input is no batch of maps of the layer's channels, dtype and device.
            BackendError: the backend that was asked for cannot serve the call.
        """
        if torch.jit.is_scripting():
            return self._plain_forward(input)
        return self._fused_forward(input)

    @torch.jit.unused
    def _fused_forward(self, x: Tensor) -> Tensor:
        reason = unsupported_reason(x) or self.plain_reason()
        if reason is None:
            weight = self.weight
            reason = foreign_reason(weight, self.bias)
        if reason is not None:
            backends.leave_to_reference("linear", reason)
            return super().forward(x)
        check_input("x", x, weight, "weight", "B", weight.shape[1], "H", "W")
        height, width = self.kernel_size
        rows, columns = x.shape[2] // height, x.shape[3] // width
        dtype = autocast_dtype(x) or x.dtype
        if rows * columns == 0 or backends.choose("linear", x, dtype).backend == "reference":
            return super().forward(x)
        x = x[:, :, : rows * height, : columns * width].permute(0, 2, 3, 1)
        patches = x.unflatten(2, (columns, width)).unflatten(1, (rows, height)).transpose(2, 3).flatten(3)
        flat = weight.permute(0, 2, 3, 1).flatten(1)  # the channels of a pixel side by side
        return linear_layer(patches, flat, self.bias).permute(0, 3, 1, 2)

    def plain_reason(self) -> str | None:
        """As of ``Fusion``."""
        reason = children_reason(self, {}, ("weight", "bias"))
        if reason is not None:
            return reason
        kernel_size = tuple(self.weight.shape[2:])
        if self.__dict__.get("kernel_size") != kernel_size:
            return f"the weight has patches of {kernel_size}, which is not the module's kernel_size"
        return convolution_reason("the projection", self, stride=kernel_size, padding=(0, 0))


class FusedPatchProjection(PatchProjectionFusion, PatchProjection):
    """A convolution whose patches do not overlap, as a linear layer of patches on the CPU.

    Constructor, parameters and state_dict are those of ``torch.nn.Conv2d``, with a stride of the kernel's size.
    """
