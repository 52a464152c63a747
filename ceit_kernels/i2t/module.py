"""The module that a user drops in for the image-to-tokens stem."""

from __future__ import annotations

from torch import Tensor, nn

from .. import backends
from ..common.checks import check_input
from ..common.module import adopt
from .reference import image2tokens_reference

__all__ = ["FusedImage2Tokens"]


class FusedImage2Tokens(nn.Module):
    """The image-to-tokens stem (CeiT, section 3.2): convolution, BatchNorm, 3x3 maximum pool of stride 2.

    Constructor, children and state_dict are the plain module's (``conv``, ``bn``, ``maxpool``).

    Args:
        in_chans: channels of the image.
        out_chans: channels of the result.
        kernel_size: side of the convolution's kernel.
        stride: stride of the convolution.
    """

    def __init__(self, in_chans: int = 3, out_chans: int = 64, kernel_size: int = 7, stride: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    @classmethod
    def from_plain(cls, plain: nn.Module) -> FusedImage2Tokens:
        """A fused module over the state of a plain one, which has the same children."""
        children = {"conv": nn.Conv2d, "bn": (nn.BatchNorm2d, nn.SyncBatchNorm), "maxpool": nn.MaxPool2d}
        return adopt(cls, plain, (), children)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_chans, H, W) -> (B, out_chans, H', W').

        Raises:
            ValueError, TypeError: x is no batch of images of the module's channels, dtype and device.
            BackendError: the backend that was asked for cannot serve the call.
        """
        check_input("x", x, self.conv.weight, "conv.weight", "B", self.conv.in_channels, "H", "W")
        backends.choose("i2t", x, x.dtype)
        return image2tokens_reference(x, self.conv.weight, self.bn, self.conv.stride[0])
