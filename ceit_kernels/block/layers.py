"""The block over class tokens at inference on the CPU in one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..common.children import child_reason
from ..lca import FusedLCAAttention
from ..leff.activations import INDICES
from .arguments import CallArguments, are_readable, attention_tensors, can_run_fused, is_idle, linear_tensors

__all__ = ["LayersParts", "layers_arguments", "layers_inference"]

torch.library.define(
    "ceit::_layers_infer",
    "(Tensor x, Tensor?[] parameters, float[] scalars, int[] sizes, Tensor(a!) out) -> ()",
)

_OPERATORS = ("linear", "lca")


class LayersParts(NamedTuple):
    """Of the block ``y = x[:, -1:] + attention(norm1(x)); y + fc2(gelu(fc1(norm2(y))))`` (CeiT, section 3.4)."""

    norm1: nn.Module
    attention: nn.Module
    norm2: nn.Module
    fc1: nn.Module
    activation: nn.Module
    fc2: nn.Module
    dropouts: tuple[nn.Module, ...] = ()


def layers_inference(x: Tensor, parts: LayersParts) -> Tensor | None:
    """The last of x (B, L, C), having asked all of them: (B, 1, C). None as for ``encoder_inference``.

    Args:
        x: class tokens of all layers, on the CPU.
        parts: of a block that does nothing else.
    """
    if not can_run_fused(x, 3, _OPERATORS):
        return None
    arguments = layers_arguments(x, parts)
    if arguments is None:
        return None
    out = x.new_empty(x.shape[0], 1, x.shape[2])
    torch.ops.ceit._layers_infer(x.contiguous(), *arguments, out)
    return out


def layers_arguments(x: Tensor, parts: LayersParts) -> CallArguments | None:
    """What the compiled call takes of a block as it is now; None where a part has to be called."""
    channels = x.shape[2]
    found = attention_tensors(parts.norm1, parts.attention, parts.norm2, FusedLCAAttention, channels)
    if found is None or child_reason("activation", parts.activation, (nn.GELU,)) is not None:
        return None
    if not all(is_idle(dropout) for dropout in parts.dropouts):
        return None
    hidden = getattr(parts.fc1, "out_features", None)
    fc1, fc2 = linear_tensors(parts.fc1, hidden, channels), linear_tensors(parts.fc2, channels, hidden)
    if fc1 is None or fc2 is None:
        return None
    tensors, scalars = found
    parameters = [*tensors, *fc1, *fc2]
    if not are_readable(x, parameters):
        return None
    gelu = "gelu" if parts.activation.approximate == "none" else "gelu_tanh"
    return CallArguments(parameters, scalars, [channels, parts.attention.num_heads, hidden, INDICES[gelu]])
