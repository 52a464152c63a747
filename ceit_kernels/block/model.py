"""A whole CeiT at inference on the CPU, from images to logits, in one call that reads prepacked weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..add_norm.module import is_plain_layer_norm
from .arguments import are_readable, can_run_fused, linear_tensors
from .embedding import embedding_arguments, reads_stem
from .encoder import EncoderParts, encoder_arguments
from .layers import LayersParts, layers_arguments

__all__ = ["ModelParts", "WholeModel", "prepare_model"]

torch.library.define(
    "ceit::_model_prepack",
    "(Tensor image, int map_channels, Tensor?[] parameters, float[] scalars, int[] sizes) -> Tensor",
)
torch.library.define(
    "ceit::_model_infer",
    "(Tensor image, Tensor stem, Tensor sign, Tensor norm, Tensor packed, float[] scalars, int[] sizes) -> Tensor",
)

_OPERATORS = ("i2t", "linear", "add_norm", "attention", "leff", "lca")


class ModelParts(NamedTuple):
    """What a CeiT is made of (Yuan et al., ICCV 2021), all that it does included."""

    stem: nn.Module
    projection: nn.Module
    class_token: Tensor
    positions: Tensor
    blocks: Sequence[EncoderParts | None]
    layer_positions: Tensor
    layers: LayersParts
    norm: nn.Module
    head: nn.Module


class WholeModel:
    """Logits (B, classes) of images (B, I, H, W) of one size on the CPU; None for what takes other calls."""

    def __init__(self, like: Tensor, stem: tuple[Tensor, Tensor, Tensor], prepacked: Tensor, scalars, sizes) -> None:
        self._like, self._stem, self._prepacked = (like.shape[1:], like.dtype), stem, prepacked
        self._scalars, self._sizes = scalars, sizes

    def __call__(self, x: Tensor) -> Tensor | None:
        """The logits of images x."""
        if x.device.type != "cpu" or (x.shape[1:], x.dtype) != self._like or not can_run_fused(x, 4, _OPERATORS):
            return None
        return torch.ops.ceit._model_infer(x, *self._stem, self._prepacked, self._scalars, self._sizes)


@torch.no_grad()
def prepare_model(parts: ModelParts, image_size: tuple[int, int]) -> WholeModel | None:
    """Fold and prepack a model in evaluation mode; None where one of its parts has to be called.

    Args:
        parts: the model.
        image_size: (H, W) of its images.
    """
    if not reads_stem(parts.stem):
        return None
    weight = parts.stem.conv.weight
    if weight.device.type != "cpu":
        return None
    image = weight.new_empty(1, weight.shape[1], *image_size)
    if not can_run_fused(image, 4, _OPERATORS) or not is_plain_layer_norm(parts.norm):
        return None
    embedding = embedding_arguments(image, parts.stem, parts.projection, parts.class_token, parts.positions)
    if embedding is None:
        return None
    channels = parts.positions.shape[2]
    grid_size = embedding.grid_size(image_size)
    tokens = image.new_empty(1, parts.positions.shape[1], channels)
    encoder = encoder_arguments(tokens, parts.blocks, grid_size, class_token_only=True)
    layers = layers_arguments(tokens, parts.layers)
    head = linear_tensors(parts.head, getattr(parts.head, "out_features", None), channels)
    if encoder is None or layers is None or head is None:
        return None
    rest = [parts.norm.weight, parts.norm.bias, *head]
    if not are_readable(image, [*rest, parts.layer_positions]):
        return None
    parameters = [*embedding.parameters, *encoder.parameters, parts.layer_positions, *layers.parameters, *rest]
    scalars = [*encoder.scalars, *layers.scalars, parts.norm.eps]
    sizes = [embedding.height, embedding.width, *encoder.sizes, *layers.sizes, head[0].shape[0]]
    map_channels = embedding.sign.shape[0]
    prepacked = torch.ops.ceit._model_prepack(image, map_channels, parameters, scalars, sizes)
    return WholeModel(image, (embedding.stem, embedding.sign, embedding.norm), prepacked, scalars, sizes)
