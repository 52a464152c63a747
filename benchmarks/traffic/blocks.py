"""The feed-forward blocks of other libraries' models, as counted workloads."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ceit_kernels import fuse

from .compiled import count_compiled
from .counting import Call, count_call

__all__ = ["BLOCKS", "Block", "count_block"]


class Block(NamedTuple):
    """A block at a size that a model has.

    Attributes:
        name: the model, and where it is the stage.
        make: makes it.
        shape: of its input for one image.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


class _OnTokens(nn.Module):
    """A block that is told the height and the width of the image that its tokens make."""

    def __init__(self, block: nn.Module, *size: Any) -> None:
        super().__init__()
        self.block, self.size = block, size

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, *self.size)


def _segformer(channels: int, side: int) -> Block:
    def make() -> nn.Module:
        from transformers import SegformerConfig

        segformer = importlib.import_module("transformers.models.segformer.modeling_segformer")
        mix_ffn = getattr(segformer, "SegformerMixMLP", None) or segformer.SegformerMixFFN
        block = mix_ffn(SegformerConfig(hidden_dropout_prob=0.0), channels, 4 * channels, channels)
        return _OnTokens(block, side, side)

    return Block(f"SegFormer-B0 at 512, {side} x {side}", make, (side * side, channels))


def _timm(name: str, module: str, of: str, shape: tuple[int, ...], *sizes: Any, **options: Any) -> Block:
    def make() -> nn.Module:
        block = getattr(importlib.import_module(f"timm.{module}"), of)(*sizes, **options)
        return block if len(shape) == 3 else _OnTokens(block, [int(shape[0] ** 0.5)] * 2)

    return Block(name, make, shape)


BLOCKS = (
    _segformer(32, 128),
    _segformer(160, 32),
    _timm("PVTv2-B0, 56 x 56", "models.pvt_v2", "MlpWithDepthwiseConv", (3136, 32), 32, 256),
    _timm("PVTv2-B0, 14 x 14", "models.pvt_v2", "MlpWithDepthwiseConv", (196, 160), 160, 640),
    _timm(
        "EfficientFormerV2-S0, 28 x 28",
        "models.efficientformer_v2",
        "ConvMlpWithNorm",
        (48, 28, 28),
        *(48, 192),
        mid_conv=True,
    ),
    _timm("TinyViT-5M, 56 x 56", "models.tiny_vit", "MBConv", (64, 56, 56), 64, 64, 4.0, nn.GELU, 0.0),
    _timm(
        "MobileNetV2, 56 x 56",
        "models._efficientnet_blocks",
        "InvertedResidual",
        (24, 56, 56),
        *(24, 24),
        exp_ratio=6.0,
        act_layer=nn.ReLU6,
    ),
)


def count_block(block: Block, implementation: str, batch: int, dtype: str, training: bool) -> Call:
    """The kernels of a call by "plain", "fused" or "compile", on an H100."""
    shape, arguments = (batch, *block.shape), {"training": training, "input_gradient": training}
    if implementation == "compile":
        return count_compiled(block.make, shape, getattr(torch, dtype), **arguments)
    make = (lambda: fuse(block.make())) if implementation == "fused" else block.make
    return count_call(make, shape, getattr(torch, dtype), **arguments, chip=90)
