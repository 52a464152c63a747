"""Tokens put together with their positions in one pass, and the sums over images in the gradient in another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor

from .. import backends
from ..common.autocast import autocast_dtype
from ..common.calls import foreign_reason, needs_gradient, unsupported_reason
from ..common.children import held
from .op import column_sums_operator, join_tokens_operator
from .reference import column_sums_reference

__all__ = ["embed_tokens", "join_layers"]

_BIASES = 3  # whose gradients are summed with that of the positions


def embed_tokens(prefix: Tensor, tokens: Tensor, positions: Tensor) -> Tensor | None:
    """``torch.cat((prefix of every image, tokens), 1) + positions``; None where plain PyTorch is to compute it.

    Args:
        prefix: a token of all images, (1, 1, C).
        tokens: (B, N, C).
        positions: (1, 1 + N, C).
    """
    if not _serves(positions, (prefix, tokens), None, True):
        return None
    return _joined(True, None, positions, *[None] * (_BIASES + 1), prefix, tokens)[0]


def join_layers(
    tokens: Sequence[Tensor],
    added: Tensor | None,
    positions: Tensor,
    linears: Callable[[], Sequence[nn.Module]] = tuple,
) -> tuple[Tensor, dict[nn.Module, Tensor]] | None:
    """``torch.cat(tokens, 1) + positions``, with the last tensor added; None where plain PyTorch is to compute it.

    Args:
        tokens: of each layer, (B, 1, C).
        added: (B, 1, C), to the last of them, or None.
        positions: (1, layers, C).
        linears: tells up to three linear layers, behind it to be called with one token of each image.

    Returns:
        The tokens (B, layers, C). By each linear layer whose bias's gradient is to be summed with that of the positions
        what ``linear_given`` takes.
    """
    if not _serves(positions, tokens, added, False):
        return None
    # Where nothing ahead has a gradient, it would be taken back as far as here for the biases' alone.
    known = linears() if needs_gradient(positions, added, *tokens) else ()
    taken = [layer for layer in dict.fromkeys(known) if _has_bias(layer)]
    biases = [held(layer, "bias") for layer in taken] + [None] * (_BIASES - len(taken))
    out, *given = _joined(False, autocast_dtype(positions), positions, *biases, added, *tokens)
    return out, dict(zip(taken, given[: len(taken)], strict=True))


def _serves(positions: Tensor, tokens: Sequence[Tensor], added: Tensor | None, shared: bool) -> bool:
    """Whether the kernel computes it; not in a graph, nor what does not fit, of which plain PyTorch says why."""
    if torch.compiler.is_compiling() or unsupported_reason(positions, added, *tokens) is not None:
        return False
    inputs = positions, tokens, added, shared
    if backends.choose("add_norm", positions, join_tokens_operator.compute_dtype(*inputs)).backend != "triton":
        return False
    try:
        join_tokens_operator.check(*inputs)
    except (TypeError, ValueError):
        return False
    return join_tokens_operator.unsupported(*inputs) is None


def _has_bias(layer: nn.Module) -> bool:
    """Whether a linear layer has a bias whose gradient may be summed elsewhere."""
    weight, bias = held(layer, "weight"), held(layer, "bias")
    if bias is None or not bias.requires_grad or foreign_reason(weight, bias) is not None:
        return False
    return backends.current_backend("linear") in ("auto", "reference")


class _Joined(torch.autograd.Function):
    """Tokens with their positions; for each bias a result (B, F) without values, whose gradient is summed for it."""

    @staticmethod
    def forward(ctx: Any, shared: bool, dtype: torch.dtype | None, *inputs: Any) -> tuple[Tensor | None, ...]:
        (positions, *biases), added, tokens = inputs[: 1 + _BIASES], inputs[1 + _BIASES], inputs[2 + _BIASES :]
        ctx.set_materialize_grads(False)
        ctx.shared, ctx.counts = shared, [tensor.shape[1] for tensor in tokens]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        out = join_tokens_operator(positions, tokens, added, shared, "triton")
        empty = out.new_empty(1, dtype=dtype or out.dtype)
        return out, *(None if bias is None else empty.expand(out.shape[0], bias.shape[0]) for bias in biases)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        needed = [dtype if need else None for dtype, need in zip(ctx.dtypes, ctx.needs_input_grad[2:], strict=True)]
        dtypes = [None if g is None else dtype for g, dtype in zip(grads, needed[: 1 + _BIASES], strict=True)]
        of_added, *of_tokens = needed[1 + _BIASES :] if grad is not None else [None] * (1 + len(ctx.counts))
        dtypes += [of_tokens[0] if ctx.shared else None, of_tokens[-1] if ctx.counts[-1] > 1 else None]
        *sums, first, rest = _sums(grads, dtypes)
        if grad is None:
            return None, None, *sums, None, *of_tokens
        sums[0] = None if sums[0] is None else sums[0].view(1, *grad.shape[1:])
        parts = grad.split(ctx.counts, 1)
        of_added = of_added and parts[-1].to(of_added)
        found = [dtype and part.to(dtype) for part, dtype in zip(parts, of_tokens, strict=True)]
        found[0] = found[0] if first is None else first.view(1, 1, -1)
        found[-1] = found[-1] if rest is None else rest
        return None, None, *sums, of_added, *found


_joined: Callable[..., Any] = _Joined.apply


def _sums(grads: Sequence[Any], dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    """What ``ceit::column_sums`` computes; second derivatives and batches of gradients are PyTorch's."""
    if not any(dtypes):
        return [None] * len(dtypes)
    there = [grad for grad in grads if grad is not None]
    plain = grads[0] is None or torch.is_grad_enabled() or unsupported_reason(*there) is not None
    if plain or any(map(is_legacy_batchedtensor, there)) or column_sums_operator.unsupported(*grads) is not None:
        return column_sums_reference(*grads, *dtypes)
    found = column_sums_operator(*grads, *dtypes, "triton")
    return [None if dtype is None else result for result, dtype in zip(found, dtypes, strict=True)]
