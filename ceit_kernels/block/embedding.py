"""From images to tokens at inference on the CPU in one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..common.products import has_panels, in_panels, once_per_version
from ..i2t import FusedImage2Tokens
from ..linear import FusedPatchProjection
from ..linear.patches import flattened
from .arguments import may_go_at_once
from .watch import Watch, kept_by

__all__ = ["embedding_inference"]

torch.library.define(
    "ceit::_embedding_infer",
    "(Tensor image, Tensor stem, Tensor sign, Tensor norm, Tensor projection, Tensor? bias, int patch_height, "
    "int patch_width, Tensor class_token, Tensor positions, Tensor(a!) out) -> ()",
)

_OPERATORS = ("i2t", "linear")
_OF_CONVOLUTIONS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "ceil_mode", "momentum")


class _Embedding(NamedTuple):
    watch: Watch
    setting: tuple
    arguments: tuple


def embedding_inference(
    x: Tensor, stem: nn.Module, projection: nn.Module, class_token: Tensor, positions: Tensor
) -> Tensor | None:
    """The class token and the projected patches of the stem's map, positions added (CeiT, sections 3.1 and 3.2).

    None as for ``encoder_inference``.

    Args:
        x: images (B, I, H, W) on the CPU, at least a patch in size.
        stem: a ``FusedImage2Tokens``.
        projection: a ``FusedPatchProjection`` of its map.
        class_token: (1, 1, C).
        positions: (1, 1 + tokens, C).
    """
    if x.dim() != 4 or x.numel() == 0 or not may_go_at_once(x, _OPERATORS):
        return None
    if type(stem) is not FusedImage2Tokens or type(projection) is not FusedPatchProjection:
        return None
    if not has_panels(x.dtype, projection.weight[0].numel()):
        return None
    tensors = (class_token, positions, stem.conv.weight, projection.weight)
    if any((tensor.dtype, tensor.device) != (x.dtype, x.device) for tensor in tensors):
        return None
    arguments = _prepared(x, stem, projection)
    if arguments is None:
        return None
    out = x.new_empty(x.shape[0], *positions.shape[1:])
    torch.ops.ceit._embedding_infer(x, *arguments, class_token.contiguous(), positions.contiguous(), out)
    return out


def _prepared(x: Tensor, stem: FusedImage2Tokens, projection: FusedPatchProjection) -> tuple | None:
    kept, setting = kept_by(projection), (x.shape[1:], x.dtype)
    known = kept.get("embedding")
    if known is not None and known.setting == setting and known.watch():
        return known.arguments
    watch = Watch([stem, projection], _OF_CONVOLUTIONS)
    parts = stem.inference_parts(x) if watch.can_tell else None
    if parts is None or projection.in_channels != stem.conv.out_channels:
        return None
    flat = once_per_version(projection.weight, flattened)
    arguments = (*parts, in_panels(flat, x.shape[0], constant=True), projection.bias, *projection.kernel_size)
    kept["embedding"] = _Embedding(watch, setting, arguments)
    return arguments
