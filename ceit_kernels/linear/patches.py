"""The module that a user drops in for a projection of patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends
from ..common.autocast import autocast_dtype
from ..common.checks import check_input
from ..common.module import adopt
from ..common.products import once_per_version
from ..common.registration import is_plain_call
from .module import linear_layer

__all__ = ["FusedPatchProjection", "flattened"]

# What a convolution has to have for its patches to be side by side and whole.
_WHOLE = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros", "transposed": False}


class FusedPatchProjection(nn.Conv2d):
    """A convolution whose patches do not overlap, as a linear layer of patches on the CPU.

    Constructor, parameters and state_dict are those of ``torch.nn.Conv2d`` with a stride of the kernel's size; pixels
    beyond the last whole patch are dropped, as there. A map in channels-last memory is read as it lies.
    """

    @classmethod
    def from_plain(cls, plain: nn.Module) -> FusedPatchProjection:
        """A fused module over the state of a plain one.

        Raises:
            TypeError: patches of the convolution overlap, have gaps, or are padded.
        """
        fused = adopt(cls, plain, ("kernel_size", "stride", "weight", "bias", *_WHOLE), {})
        wrong = [name for name, value in _WHOLE.items() if getattr(plain, name) != value]
        if wrong or plain.kernel_size != plain.stride:
            raise TypeError(f"plain: FusedPatchProjection needs patches side by side, got {plain}")
        return fused

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, H // stride, W // stride), in channels-last memory on the CPU.

        Raises:
            ValueError, TypeError: x is no batch of maps of the layer's channels, dtype and device.
            BackendError: the backend that was asked for cannot serve the call.
        """
        weight = self.weight
        check_input("x", x, weight, "weight", "B", self.in_channels, "H", "W")
        height, width = self.kernel_size
        rows, columns = x.shape[2] // height, x.shape[3] // width
        dtype = autocast_dtype(x) or x.dtype
        if rows * columns == 0 or backends.choose("linear", x, dtype).backend == "reference":
            return super().forward(x)
        x = x[:, :, : rows * height, : columns * width].permute(0, 2, 3, 1)
        patches = x.unflatten(2, (columns, width)).unflatten(1, (rows, height)).transpose(2, 3).flatten(3)
        if torch.is_grad_enabled() or not is_plain_call(weight) or weight.is_inference():
            flat = flattened(weight)
        else:
            flat = once_per_version(weight, flattened)
        training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return linear_layer(patches, flat, self.bias, constant=not (training or self.training)).permute(0, 3, 1, 2)


def flattened(weight: Tensor) -> Tensor:
    """(out_channels, patch), with the channels of a pixel side by side."""
    return weight.permute(0, 2, 3, 1).flatten(1)
