"""Runs the encoder blocks, fused as far as each of them allows."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ceit_kernels.block import encoder_inference

from .blocks import Block, encoder_parts
from .recompute import checkpoint_module
from .shortcuts import is_eager, is_exactly, is_symbolic


def encode(
    x: Tensor,
    blocks: Iterable[nn.Module],
    grid_size: tuple[int, int],
    taken: Sequence[int] = (),
    *,
    class_token_only: bool = False,
    recomputes: bool = False,
) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Run blocks.

    Args:
        x: tokens (B, 1 + H * W, C).
        blocks: modules that are called with tokens and their grid.
        grid_size: (H, W).
        taken: indices of the blocks whose tokens are wanted.
        class_token_only: whether the last block may leave out its patch tokens.
        recomputes: whether backward recomputes the blocks instead of keeping their activations.

    Returns:
        The last block's tokens (B, 1 + H * W, C), with `class_token_only` what is still to be added to its class token
        (B, 1, C) or None; every block's class token (B, 1, C), or all in one tensor (B, len(blocks), C); the tokens of
        the blocks `taken`.
    """
    blocks = list(blocks)
    if not taken and (found := _encode_fused(x, blocks, grid_size, class_token_only)) is not None:
        return None if class_token_only else found[0], [found[1]], []
    class_tokens, outputs, added = [], [], None
    for index, block in enumerate(blocks):
        short = class_token_only and index == len(blocks) - 1
        x, class_token, added = _call_block(block, x, grid_size, short, recomputes)
        class_tokens += [class_token] if index > 0 else []
        if index in taken:
            outputs.append(x)
    # To be concatenated and not stacked: the gradients are then views, and a tensor that is whole needs no slice.
    class_tokens.append(x if not is_symbolic(x) and x.shape[1] == 1 else x[:, :1])
    return added if class_token_only else x, class_tokens, outputs


def _encode_fused(
    x: Tensor, blocks: Sequence[nn.Module], grid_size: tuple[int, int], class_token_only: bool
) -> tuple[Tensor, Tensor] | None:
    """Run several blocks by one compiled call each; None if their parts have to be called one by one.

    Returns:
        The last block's tokens (B, 1 + N, dim), or (B, 1, dim) with `class_token_only`; every block's class token
        (B, len(blocks), dim).
    """
    ours = [block for block in blocks if is_exactly(block, Block)]
    if torch.is_grad_enabled() or not is_eager(x) or len(ours) < len(blocks):
        return None
    found = encoder_inference(x, ours, encoder_parts, grid_size, class_token_only)
    if found is None and class_token_only and len(ours) > 1 and ours[-1].class_token_suffices():
        found = encoder_inference(x, ours[:-1], encoder_parts, grid_size)
        if found is not None:
            out = ours[-1](found[0], grid_size, True)
            return out, torch.cat((found[1], out), dim=1)
    return found


def _call_block(
    block: nn.Module, x: Tensor, grid_size: tuple[int, int], class_token_only: bool, recomputes: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A block's output, all tokens (B, 1 + N, C) or the class token alone, a class token (B, 1, C), and what to add.

    The class token is that of `x`. To the output, if that is the class token alone, something may have to be added.
    A block that is wrapped, hooked or of another class is only called.
    """
    if is_symbolic(x):
        return _record_block(block, x, grid_size, class_token_only), x[:, :1], None
    function: Callable[..., Any] = block
    short = passes = False
    if is_exactly(block, Block):
        short = class_token_only and block.class_token_suffices()
        passes = block.passes_class_token()
        if short and passes:
            x, added, class_token = block.class_token_halves(x, grid_size)
            return x, class_token, added
        function = block.forward_with_class_token if passes else block
    arguments = (x, grid_size, short) if passes or short else (x, grid_size)
    if recomputes and not short:
        function = partial(checkpoint_module, block, function=function)
    out = function(*arguments)
    return (*out, None) if passes else (out, x[:, :1], None)


def _record_block(block: nn.Module, x: Any, grid_size: tuple[int, int], class_token_only: bool) -> Any:
    """Record a block of a torch.fx.Proxy `x` in a graph with every token, from which features may be extracted.

    If timm's tracer records the block as one node, the class token gets a node of its own; the first node is dropped
    from the graph if nothing uses it.
    """
    out = block(x, grid_size)
    if not is_exactly(block, Block) or not x.tracer.is_leaf_module(block, ""):
        return out
    short = class_token_only and not block.training and block.class_token_suffices()
    return block(x, grid_size, True) if short else out
