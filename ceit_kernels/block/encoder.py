"""Encoder blocks at inference on the CPU in one call, where each of their operators would run by compiled code.

One image takes half a millisecond of a block in compiled code, and operator by operator as much in Python between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..attention import FusedAttention
from ..common.autocast import autocast_dtype
from ..common.children import child_reason
from ..leff import FrozenLeFF, FusedLeFF
from ..leff.cpu import leff_sizes
from ..leff.grid import token_grid
from .arguments import CallArguments, are_readable, attention_tensors, can_run_fused

__all__ = ["OPERATORS", "EncoderParts", "encoder_arguments", "encoder_inference"]

torch.library.define(
    "ceit::_encoder_infer",
    "(Tensor x, Tensor?[] parameters, float[] scalars, int[] sizes, bool in_bfloat16, bool class_token_only, "
    "Tensor(a!) out, Tensor(b!) class_tokens) -> ()",
)

OPERATORS = ("add_norm", "linear", "attention", "leff")

Block = TypeVar("Block", bound=nn.Module)


class EncoderParts(NamedTuple):
    """What an encoder block is made of: ``y = x + attention(norm1(x)); y + leff(norm2(y))`` (CeiT, section 3.3)."""

    norm1: nn.Module
    attention: nn.Module
    norm2: nn.Module
    leff: nn.Module


def encoder_inference(
    x: Tensor,
    blocks: Sequence[Block],
    parts_of: Callable[[Block], EncoderParts | None],
    grid_size: tuple[int, int] | None = None,
    class_token_only: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Tokens (B, P + H * W, C) behind the last block, and the first token behind every block (B, len(blocks), C).

    Under autocast in bfloat16 tokens in float32 stay in it, and what the GEMMs take is rounded.

    None where that takes other calls: a gradient may be wanted, a hook, compiler or dispatch mode is active, a module
    is not the fused or plain one that is known or is in training mode, an operator does not run natively, or the class
    token cannot be computed alone.

    Args:
        x: tokens (B, P + H * W, C) on the CPU.
        blocks: modules whose children do all that they do.
        parts_of: the children of a block; None for a block that does more.
        grid_size: (H, W); a square if None.
        class_token_only: return (B, 1, C) instead of all tokens, and do not compute the others of the last block.

    Raises:
        ValueError: the tokens make no such image.
    """
    in_bfloat16 = autocast_dtype(x) is torch.bfloat16 and x.dtype in (torch.float32, torch.bfloat16)
    if not can_run_fused(x, 3, OPERATORS, torch.bfloat16 if in_bfloat16 else None):
        return None
    arguments = encoder_arguments(x, [parts_of(block) for block in blocks], grid_size, class_token_only)
    if arguments is None:
        return None
    out = x.new_empty(x.shape)
    class_tokens = x.new_empty(x.shape[0], len(blocks), x.shape[2])
    torch.ops.ceit._encoder_infer(x.contiguous(), *arguments, in_bfloat16, class_token_only, out, class_tokens)
    return class_tokens[:, -1:].clone() if class_token_only else out, class_tokens


def encoder_arguments(
    x: Tensor,
    parts: Sequence[EncoderParts | None],
    grid_size: tuple[int, int] | None = None,
    class_token_only: bool = False,
) -> CallArguments | None:
    """What the compiled call takes of blocks as they are now; None where one has to be called.

    Args:
        x, grid_size, class_token_only: as of ``encoder_inference``.
        parts: of each block.
    """
    found: list[CallArguments] = []
    for part in parts:
        arguments = None if part is None else _block_arguments(x, part, grid_size, class_token_only)
        # One call takes blocks of one size.
        if arguments is None or (found and arguments.sizes != found[0].sizes):
            return None
        found.append(arguments)
    parameters = [tensor for arguments in found for tensor in arguments.parameters]
    if not found or not are_readable(x, parameters):
        return None
    scalars = [scalar for arguments in found for scalar in arguments.scalars]
    return CallArguments(parameters, scalars, [*found[0].sizes, len(found)])


def _block_arguments(
    x: Tensor, parts: EncoderParts, grid_size: tuple[int, int] | None, class_token_only: bool
) -> CallArguments | None:
    norm1, attention, norm2, leff = parts
    channels = x.shape[2]
    found = attention_tensors(norm1, attention, norm2, FusedAttention, channels)
    if found is None or child_reason("leff", leff, (FusedLeFF, FrozenLeFF)) is not None or leff.layout != "tokens":
        return None
    leff_parts = leff.inference_parts()
    # LeFF leaves one prefix token as it is.
    if leff_parts is None or (class_token_only and leff.num_prefix_tokens != 1):
        return None
    parameters, eps, activations = leff_parts
    grid_size = token_grid(x.shape[1], leff.num_prefix_tokens, grid_size)
    inputs, hidden, outputs, *rest = leff_sizes(parameters, activations, grid_size)
    if (inputs, outputs) != (channels, channels):
        return None
    tensors, scalars = found
    return CallArguments([*tensors, *parameters], [*scalars, *eps], [channels, attention.num_heads, hidden, *rest])
