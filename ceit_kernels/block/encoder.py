"""Encoder blocks at inference on the CPU in one call each, where each of their operators would run by compiled code.

One image takes half a millisecond of a block in products and stages, and as much in Python between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..add_norm.module import is_plain_layer_norm
from ..attention import FusedAttention
from ..common.products import has_panels, in_panels, packed
from ..leff import FusedLeFF
from ..leff.folding import FoldedWeights, fold, is_kept
from ..leff.grid import token_grid
from ..leff.native.inference import bytes_in_cache
from ..leff.native.stages import activation_index, images_at_a_time
from ..linear import FusedLinear
from .arguments import attention_arguments, attention_schema, may_go_at_once
from .watch import Watch, kept_by

__all__ = ["EncoderParts", "encoder_inference"]

torch.library.define(
    "ceit::_block_infer",
    f"(Tensor x, {attention_schema}, Tensor weight1, Tensor bias1, Tensor taps, Tensor bias2, Tensor weight3, "
    "Tensor bias3, int first, int second, int height, int width, int images, Tensor(a!) out, Tensor(b!) class_tokens, "
    "int layer) -> ()",
)
torch.library.define(
    "ceit::_block_infer_class_token", f"(Tensor x, {attention_schema}, Tensor(a!) class_tokens, int layer) -> ()"
)

_OPERATORS = ("norm", "linear", "attention", "leff")
_MOST_KEPT = 8  # sizes of images, for instance


class EncoderParts(NamedTuple):
    """What an encoder block is made of: ``y = x + attention(norm1(x)); y + leff(norm2(y))`` (CeiT, section 3.3)."""

    norm1: nn.Module
    attention: nn.Module
    norm2: nn.Module
    leff: nn.Module


class _Encoder(NamedTuple):
    """What was prepared for some blocks."""

    blocks: tuple[nn.Module, ...]
    watch: Watch
    folded: list[tuple[Tensor, FoldedWeights]]
    calls: list[tuple]
    for_class_token: tuple | None


def encoder_inference(
    x: Tensor,
    blocks: Sequence[nn.Module],
    parts_of: Callable[[nn.Module], EncoderParts | None],
    grid_size: tuple[int, int] | None = None,
    class_token_only: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Tokens (B, P + H * W, C) behind the last block, and the first token behind every block (B, len(blocks), C).

    None where that takes other calls: a gradient may be wanted, someone watches (hooks, a compiler, a dispatch mode), a
    module is not the fused or plain one that is known or is in training mode, an operator does not run natively, or it
    is a class token that cannot be computed alone.

    Args:
        x: tokens (B, P + H * W, C) on the CPU.
        blocks: modules whose children do all that they do.
        parts_of: the children of a block; None for a block that does more.
        grid_size: (H, W); a square if None.
        class_token_only: return (B, 1, C) instead of all tokens, and do not compute the others of the last block.

    Raises:
        ValueError: the tokens make no such image.
    """
    if x.dim() != 3 or x.numel() == 0 or not may_go_at_once(x, _OPERATORS):
        return None
    encoder = _prepared(x, tuple(blocks), parts_of, grid_size, class_token_only)
    if encoder is None:
        return None
    batch, tokens, channels = x.shape
    class_tokens = x.new_empty(batch, len(blocks), channels)
    spare = [x.new_empty(batch, tokens, channels) for _ in encoder.calls[:2]]
    x = x.contiguous()
    for i, arguments in enumerate(encoder.calls):
        out = spare[i % 2]
        torch.ops.ceit._block_infer(x, *arguments, out, class_tokens, i)
        x = out
    if encoder.for_class_token is not None:
        torch.ops.ceit._block_infer_class_token(x, *encoder.for_class_token, class_tokens, len(blocks) - 1)
        x = class_tokens[:, -1:].clone()
    return x, class_tokens


def _prepared(
    x: Tensor,
    blocks: tuple[nn.Module, ...],
    parts_of: Callable[[nn.Module], EncoderParts | None],
    grid_size: tuple[int, int] | None,
    class_token_only: bool,
) -> _Encoder | None:
    """What was made of these blocks as they are; None if it cannot be told or a block is not one of those known."""
    first = parts_of(blocks[0])
    if first is None or type(first.attention) is not FusedAttention:
        return None
    # LeFF leaves one prefix token as it is.
    if class_token_only and not (has_panels(x.dtype) and first.leff.num_prefix_tokens == 1):
        return None
    kept, threads = kept_by(blocks[0]), torch.get_num_threads()
    setting = (len(blocks), x.shape[1:], x.dtype, has_panels(x.dtype), grid_size, class_token_only, threads)
    encoder = kept.get(setting)
    if (
        encoder is not None
        and encoder.blocks == blocks
        and encoder.watch()
        and all(is_kept(parameter, folded) for parameter, folded in encoder.folded)
    ):
        return encoder
    parts = [parts_of(block) for block in blocks]
    if not all(part is not None and _is_known(part, x) for part in parts):
        return None
    watch = Watch(blocks)
    if not watch.can_tell:
        return None
    encoder = _prepare(x, blocks, parts, watch, grid_size, class_token_only)
    if len(kept) >= _MOST_KEPT:
        kept.clear()
    if encoder is not None:
        kept[setting] = encoder
    return encoder


def _is_known(parts: EncoderParts, x: Tensor) -> bool:
    norm1, attention, norm2, leff = parts
    if type(attention) is not FusedAttention or type(leff) is not FusedLeFF or leff.layout != "tokens":
        return False
    if type(attention.qkv) is not FusedLinear or type(attention.proj) is not FusedLinear:
        return False
    if not (is_plain_layer_norm(norm1) and is_plain_layer_norm(norm2)):
        return False
    channels = attention.proj.out_features
    return x.shape[2] == channels == leff.conv3.out_channels


@torch.no_grad()
def _prepare(
    x: Tensor,
    blocks: tuple[nn.Module, ...],
    parts: list[EncoderParts],
    watch: Watch,
    grid_size: tuple[int, int] | None,
    class_token_only: bool,
) -> _Encoder | None:
    height, width = token_grid(x.shape[1], parts[0].leff.num_prefix_tokens, grid_size)
    calls, all_folded = [], []
    for norm1, attention, norm2, leff in parts:
        found = leff.inference_parts()
        if found is None or leff.num_prefix_tokens != parts[0].leff.num_prefix_tokens:
            return None
        parameters, eps, activations = found
        layers = (norm1, attention.qkv, attention.proj, norm2)
        tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias)] + parameters
        if any(tensor is not None and (tensor.dtype, tensor.device) != (x.dtype, x.device) for tensor in tensors):
            return None
        folded = fold(parameters, eps, x.dtype)
        all_folded.append((parameters[0], folded))
        hidden_bytes = height * width * folded.weight1.shape[0] * x.dtype.itemsize
        images = images_at_a_time(hidden_bytes, bytes_in_cache)
        rows = images * height * width
        banded = has_panels(x.dtype, *folded.weight3.shape)
        if class_token_only and not banded:
            return None
        pack = in_panels if banded else packed
        weight1, weight3 = (pack(weight, rows, constant=True) for weight in (folded.weight1, folded.weight3))
        of_leff = (weight1, folded.bias1.to(x.dtype), folded.taps, folded.bias2, weight3, folded.bias3.to(x.dtype))
        indices = [activation_index(name) for name in activations]
        of_attention = attention_arguments(norm1, attention, norm2, rows, pack)
        calls.append((*of_attention, *of_leff, *indices, height, width, images))
    if class_token_only:
        calls.pop()
    return _Encoder(blocks, watch, all_folded, calls, of_attention if class_token_only else None)
