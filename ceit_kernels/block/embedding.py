"""From images to tokens at inference on the CPU in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.children import child_reason
from ..i2t import FusedImage2Tokens
from ..linear import FusedPatchProjection
from .arguments import are_readable, can_run_fused

__all__ = ["EmbeddingArguments", "embedding_arguments", "embedding_inference", "reads_stem"]

torch.library.define(
    "ceit::_embedding_infer",
    "(Tensor image, Tensor stem, Tensor sign, Tensor norm, Tensor?[] parameters, int patch_height, int patch_width, "
    "Tensor(a!) out) -> ()",
)

_OPERATORS = ("i2t", "linear")


class EmbeddingArguments(NamedTuple):
    """What the compiled call takes beside images: the stem's weight, sign and norm, parameters, the patches' sizes."""

    stem: Tensor
    sign: Tensor
    norm: Tensor
    parameters: list[Tensor | None]
    height: int
    width: int

    def grid_size(self, image_size: Sequence[int]) -> tuple[int, int]:
        """The patches (H, W) of images of so many pixels."""
        height, width = image_size
        return (height + 3) // 4 // self.height, (width + 3) // 4 // self.width


def embedding_inference(
    x: Tensor, stem: nn.Module, projection: nn.Module, class_token: Tensor, positions: Tensor
) -> tuple[Tensor, tuple[int, int]] | None:
    """The class token and the projected patches of the stem's map, positions added (CeiT, sections 3.1 and 3.2).

    With them the grid (H, W) of the patches. None as for ``encoder_inference``.

    Args:
        x: images (B, I, H, W) on the CPU, at least a patch in size.
        stem: a ``FusedImage2Tokens``.
        projection: a ``FusedPatchProjection`` of its map.
        class_token: (1, 1, C).
        positions: (1, 1 + tokens, C).
    """
    if not can_run_fused(x, 4, _OPERATORS):
        return None
    arguments = embedding_arguments(x, stem, projection, class_token, positions)
    if arguments is None:
        return None
    out = x.new_empty(x.shape[0], *positions.shape[1:])
    torch.ops.ceit._embedding_infer(x, *arguments, out)
    return out, arguments.grid_size(x.shape[2:])


def reads_stem(stem: Any) -> bool:
    """Whether the tensors of a stem and its children may be read."""
    return child_reason("stem", stem, (FusedImage2Tokens,)) is None and stem.plain_reason() is None


def embedding_arguments(
    x: Tensor, stem: nn.Module, projection: nn.Module, class_token: Tensor, positions: Tensor
) -> EmbeddingArguments | None:
    """What the compiled call takes of the modules as they are now; None where one has to be called."""
    if not reads_stem(stem):
        return None
    if child_reason("projection", projection, (FusedPatchProjection,)) or projection.plain_reason():
        return None
    weight = projection.weight
    parameters = [weight, projection.bias, class_token, positions]
    fits = weight.shape[:2] == (positions.shape[2], stem.conv.weight.shape[0])
    if not (fits and are_readable(x, [*parameters, stem.conv.weight])):
        return None
    parts = stem.inference_parts(x)
    return None if parts is None else EmbeddingArguments(*parts, parameters, *weight.shape[2:])
