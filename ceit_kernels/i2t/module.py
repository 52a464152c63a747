"""The module that a user drops in for the image-to-tokens stem."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends
from ..common.autocast import autocast_dtype
from ..common.checks import check_input
from ..common.module import adopt
from .native_cpu import stem_arguments
from .op import size_limit
from .reference import image2tokens_reference

__all__ = ["FusedImage2Tokens"]

_POOL = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False, "return_indices": False}
_CONVOLUTION = {
    "kernel_size": (7, 7), "stride": (2, 2), "padding": (3, 3), "dilation": (1, 1), "groups": 1,
    "padding_mode": "zeros", "bias": None,
}  # fmt: skip


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
        """x (B, in_chans, H, W), contiguous or channels-last -> (B, out_chans, H', W').

        The kernels give the result in channels-last memory, in which patches of it are cut without a copy.

        Raises:
            ValueError, TypeError: x is no batch of images of the module's channels, dtype and device.
            BackendError: the backend that was asked for cannot serve the call.
        """
        check_input("x", x, self.conv.weight, "conv.weight", "B", self.conv.in_channels, "H", "W")
        bn = self.bn
        batch_statistics = bn.training or bn.running_mean is None
        parameters = (x, self.conv.weight, bn.weight, bn.bias)
        needs_gradient = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)
        phase = "training" if batch_statistics or needs_gradient else "inference"
        choice = backends.choose("i2t", x, autocast_dtype(x) or x.dtype, self._limit(x), phase)
        if choice.backend == "reference":
            return image2tokens_reference(x, self.conv.weight, bn, self.conv.stride[0])
        values_per_channel = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
        if bn.training and values_per_channel == 1:
            raise ValueError(f"x: expected more than one value per channel in training, got {tuple(x.shape)}")
        statistics = (None, None) if batch_statistics else (bn.running_mean, bn.running_var)
        out, _, mean, variance = torch.ops.ceit.i2t(
            *parameters, *statistics, bn.eps, needs_gradient, None, choice.backend
        )
        if bn.training and bn.track_running_stats and bn.running_mean is not None:
            _update_running_statistics(bn, mean, variance, values_per_channel)
        return out

    def inference_parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """What the CPU's kernel takes beside images such as x; None where it does not serve the module."""
        bn = self.bn
        if bn.training or bn.running_mean is None or self._limit(x) is not None:
            return None
        return stem_arguments(self.conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, x.dtype)

    def _limit(self, x: Tensor) -> str | None:
        for child, expected in ((self.conv, _CONVOLUTION), (self.maxpool, _POOL)):
            for name, value in expected.items():
                if getattr(child, name) not in (value, (value, value)):
                    return f"the kernels have {type(child).__name__}.{name}={value}, not {getattr(child, name)}"
        if isinstance(self.bn, nn.SyncBatchNorm) and self.bn.training and _in_process_group():
            return "SyncBatchNorm's statistics span processes, those of the kernels do not"
        return size_limit(x, self.conv.out_channels)


def _in_process_group() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@torch.no_grad()
def _update_running_statistics(bn: nn.BatchNorm2d | nn.SyncBatchNorm, mean: Tensor, variance: Tensor, n: int) -> None:
    """As ``BatchNorm2d`` does it: the unbiased variance, and a plain average where momentum is None."""
    bn.num_batches_tracked.add_(1)
    momentum = 1.0 / bn.num_batches_tracked.to(mean.dtype) if bn.momentum is None else bn.momentum
    for running, new in ((bn.running_mean, mean), (bn.running_var, variance * (n / (n - 1)))):
        running.copy_(running * (1 - momentum) + new * momentum)
