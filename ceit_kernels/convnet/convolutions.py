"""Single layers of PyTorch as steps."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..common.children import held
from .steps import ConvLayer, NotConvolutions

__all__ = ["convolution_of", "exact", "linear_of"]

_DEPTHWISE_SIDES = 3, 5, 7


def exact(tensor: Any) -> Tensor:
    """A tensor in float64."""
    return tensor.detach().double()


def linear_of(module: Any) -> ConvLayer:
    """A linear layer."""
    weight, bias = held(module, "weight").detach(), held(module, "bias")
    shift = weight.new_zeros(weight.shape[0], dtype=torch.float64) if bias is None else exact(bias)
    return ConvLayer((), weight[:, :, None, None], torch.ones_like(shift), shift, 1, 0, False)


def convolution_of(name: str, module: Any) -> ConvLayer:
    """An ``nn.Conv2d``.

    Raises:
        NotConvolutions: its settings are others than the compiled code knows.
    """
    weight, bias = held(module, "weight"), held(module, "bias")
    outputs, (side, other_side) = weight.shape[0], weight.shape[2:]
    depthwise = 1 < module.groups == outputs == module.in_channels and side in _DEPTHWISE_SIDES
    stride, padding = module.stride, module.padding
    if not all(isinstance(setting, Collection) for setting in (stride, padding, module.dilation)):
        raise NotConvolutions(f"{name} was given a number for both directions")
    stride, stride_x = stride
    if module.groups != 1 and not (depthwise and stride in (1, 2)):
        raise NotConvolutions(f"{name} has groups={module.groups}, side {side} and stride {stride}")
    if side != other_side or stride != stride_x or isinstance(padding, str) or padding[0] != padding[1]:
        raise NotConvolutions(f"{name} is not the same in both directions")
    if tuple(module.dilation) != (1, 1) or module.padding_mode != "zeros":
        raise NotConvolutions(f"{name} has dilation={module.dilation}, padding_mode={module.padding_mode}")
    shift = weight.new_zeros(outputs, dtype=torch.float64) if bias is None else exact(bias)
    return ConvLayer((), weight.detach(), torch.ones_like(shift), shift, stride, padding[0], depthwise)
