"""The calls that are counted: CeiT's operators at the sizes of one of its models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceit_kernels.backends import use_backend
from ceit_kernels.i2t import FusedImage2Tokens
from ceit_kernels.lca import FusedLCAAttention
from ceit_kernels.leff import FusedLeFF

from .compiled import count_compiled
from .counting import Call, count_call

__all__ = ["Case", "make_cases"]

_PATCH, _LAYERS, _HEAD_DIM = 16, 12, 64


@dataclass(frozen=True)
class Case:
    """A call of an operator's module.

    Attributes:
        operator: of ``ceit_kernels.operators.OPERATORS``.
        make_fused: makes the fused module.
        make_plain: makes what ``torch.compile`` is given.
        shape: of the input.
        unit: elements of one pass, in which traffic is told.
        dtype: of the input, the parameters and the buffers.
        input_gradient: whether a training step needs the input's gradient.
    """

    operator: str
    make_fused: Callable[[], nn.Module]
    make_plain: Callable[[], nn.Module]
    shape: tuple[int, ...]
    unit: int
    dtype: torch.dtype
    input_gradient: bool = True

    def count_fused(self, *, training: bool) -> Call:
        """The kernels of the fused module with the fastest backend of a GPU."""
        with use_backend("auto"):
            return count_call(
                self.make_fused, self.shape, self.dtype, training=training, input_gradient=self.input_gradient
            )

    def count_compiled(self, *, training: bool) -> Call:
        """The kernels that ``torch.compile`` makes of the plain module."""
        with use_backend("reference"):
            return count_compiled(
                self.make_plain, self.shape, self.dtype, training=training, input_gradient=self.input_gradient
            )


class _PlainLCAAttention(FusedLCAAttention):
    """The same attention as one would write it with what PyTorch has, the keys and values of all layers projected."""

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = self.qkv.weight.split([x.shape[2], 2 * x.shape[2]]), (None, None)
        if self.qkv.bias is not None:
            biases = self.qkv.bias.split([x.shape[2], 2 * x.shape[2]])
        q = F.linear(x[:, -1:], weights[0], biases[0]).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        kv = F.linear(x, weights[1], biases[1]).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, *kv.unbind(0), scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


def make_cases(batch: int, channels: int, image_size: int, dtype: torch.dtype) -> list[Case]:
    """A case for each operator.

    Args:
        batch: images.
        channels: C of a token, a multiple of 64.
        image_size: side of an image in pixels, a multiple of 16.
        dtype: of activations and parameters.

    Raises:
        ValueError: a size that makes no model.
    """
    if channels < 1 or channels % _HEAD_DIM:
        raise ValueError(f"channels: expected a multiple of {_HEAD_DIM}, got {channels}")
    if image_size < 1 or image_size % _PATCH:
        raise ValueError(f"image_size: expected a multiple of {_PATCH}, got {image_size}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    tokens, heads = 1 + (image_size // _PATCH) ** 2, channels // _HEAD_DIM

    def leff() -> nn.Module:
        return FusedLeFF(channels, 4 * channels)

    leff_shape, lca_shape = (batch, tokens, channels), (batch, _LAYERS, channels)
    image_shape = (batch, 3, image_size, image_size)
    return [
        Case("leff", leff, leff, leff_shape, batch * tokens * channels, dtype),
        Case(
            "lca",
            lambda: FusedLCAAttention(channels, heads, qkv_bias=True),
            lambda: _PlainLCAAttention(channels, heads, qkv_bias=True),
            lca_shape,
            batch * _LAYERS * channels,
            dtype,
        ),
        Case(
            "i2t",
            FusedImage2Tokens,
            FusedImage2Tokens,
            image_shape,
            batch * tokens * channels,
            dtype,
            input_gradient=False,
        ),
    ]
