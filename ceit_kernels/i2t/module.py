"""The image-to-tokens stem as a module: the plain one, and the fused one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends
from ..common.arguments import check_at_least, names_its_arguments
from ..common.calls import foreign_reason, unsupported_reason
from ..common.checks import check_input
from ..common.children import children_reason, convolution_reason
from ..common.module import Fusion, attributes_of
from ..common.sync_norm import BATCH_NORMS
from .arguments import Stem
from .cpu import stem_arguments
from .functional import image_to_tokens
from .op import size_unsupported_reason

__all__ = ["FusedImage2Tokens", "Image2Tokens"]

_CHILDREN = {"conv": (nn.Conv2d,), "bn": BATCH_NORMS, "maxpool": (nn.MaxPool2d,)}
_POOL = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False, "return_indices": False}


class Image2Tokens(nn.Module):
    """Convolutional stem of the image-to-tokens module (CeiT, section 3.2): convolution, BatchNorm, max-pooling.

    There is no activation. With the defaults the map is a quarter of the image a side, rounded up.

    Args:
        in_chans: channels of the image.
        out_chans: channels of the map.
        kernel_size: side of the convolution's kernel, in pixels.
        stride: stride of the convolution, in pixels; the pooling adds a stride of 2.

    Shapes:
        (B, in_chans, H, W) -> (B, out_chans, ceil(H / (2 * stride)), ceil(W / (2 * stride))) for an odd kernel_size.
    """

    @names_its_arguments
    def __init__(self, in_chans: int = 3, out_chans: int = 64, kernel_size: int = 7, stride: int = 2) -> None:
        super().__init__()
        check_at_least(1, in_chans=in_chans, out_chans=out_chans, kernel_size=kernel_size, stride=stride)
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Turn images (B, in_chans, H, W) into the map that patches are cut from."""
        return self.maxpool(self.bn(self.conv(x)))


class Image2TokensFusion(Fusion, attributes_of(Image2Tokens)):
    """``forward`` of the image-to-tokens stem, fused."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_chans, H, W), contiguous or channels-last -> (B, out_chans, H', W').

        The kernels give the result in channels-last memory, in which patches of it are cut without a copy.

        Raises:
            ValueError, TypeError: x is no batch of images of the module's channels, dtype and device.
            BackendError: the backend that was asked for cannot serve the call.
        """
        if torch.jit.is_scripting():
            return self._plain_forward(x)
        return self._fused_forward(x)

    @torch.jit.unused
    def _fused_forward(self, x: Tensor) -> Tensor:
        reason = unsupported_reason(x) or self.plain_reason()
        if reason is None:
            weight, bn = self.conv.weight, self.bn
            reason = foreign_reason(weight, bn.weight, bn.bias, bn.running_mean, bn.running_var)
        if reason is not None:
            backends.leave_to_reference("i2t", reason)
            return super().forward(x)
        check_input("x", x, weight, "conv.weight", "B", weight.shape[1], "H", "W")
        out = image_to_tokens(x, weight, bn)
        return super().forward(x) if out is None else out

    def plain_reason(self) -> str | None:
        """As of ``Fusion``."""
        reason = children_reason(self, _CHILDREN)
        if reason is not None:
            return reason
        conv, pool = self.conv, self.maxpool.__dict__
        if conv.weight.shape[2:] != (7, 7) or conv.bias is not None:
            return "the kernels have convolutions of 7 x 7 pixels without a bias"
        for name, value in _POOL.items():
            if pool[name] not in (value, (value, value)):
                return f"the kernels have {name}={value} in maxpool, not {pool[name]}"
        return convolution_reason("conv", conv, stride=(2, 2), padding=(3, 3))

    def inference_parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """What the CPU's kernel takes beside images such as x; None where it does not serve the module."""
        bn = self.bn
        if self.plain_reason() is not None or bn.training or bn.running_mean is None:
            return None
        weight = self.conv.weight
        if size_unsupported_reason(x, weight.shape[0]) is not None:
            return None
        stem = Stem(weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        return stem_arguments(stem, x.dtype)


class FusedImage2Tokens(Image2TokensFusion, Image2Tokens):
    """The image-to-tokens stem (CeiT, section 3.2), fused: convolution, BatchNorm, 3x3 maximum pool of stride 2.

    Constructor, children and state_dict are the plain module's.
    """
