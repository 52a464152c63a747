"""The block over class tokens at inference on the CPU in one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..add_norm.module import is_plain_layer_norm
from ..common.products import has_panels, in_panels
from ..lca import FusedLCAAttention
from ..leff.native.stages import activation_index
from ..linear import FusedLinear
from .arguments import attention_arguments, attention_schema, may_go_at_once
from .watch import Watch, kept_by

__all__ = ["LayersParts", "layers_inference"]

torch.library.define(
    "ceit::_block_infer_layers",
    f"(Tensor x, {attention_schema}, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, int activation, "
    "int hidden, Tensor(a!) out) -> ()",
)

_OPERATORS = ("linear", "lca")
_LINEAR = (nn.Linear, FusedLinear)


class LayersParts(NamedTuple):
    """Of the block ``y = x[:, -1:] + attention(norm1(x)); y + fc2(gelu(fc1(norm2(y))))`` (CeiT, section 3.4)."""

    norm1: nn.Module
    attention: nn.Module
    norm2: nn.Module
    fc1: nn.Module
    activation: nn.Module
    fc2: nn.Module


class _Block(NamedTuple):
    parts: LayersParts
    watch: Watch
    setting: tuple
    arguments: tuple


def layers_inference(x: Tensor, block: nn.Module, parts: LayersParts) -> Tensor | None:
    """The last of x (B, L, C), having asked all of them: (B, 1, C). None as for ``encoder_inference``.

    Args:
        x: class tokens of all layers, on the CPU.
        block: the module whose children ``parts`` are and do all that it does.
    """
    if x.dim() != 3 or x.numel() == 0 or not may_go_at_once(x, _OPERATORS):
        return None
    arguments = _prepared(x, block, parts)
    if arguments is None:
        return None
    out = x.new_empty(x.shape[0], 1, x.shape[2])
    torch.ops.ceit._block_infer_layers(x.contiguous(), *arguments, out)
    return out


def _prepared(x: Tensor, block: nn.Module, parts: LayersParts) -> tuple | None:
    if type(parts.attention) is not FusedLCAAttention or not has_panels(x.dtype, x.shape[2]):
        return None
    kept, setting = kept_by(block), (x.shape, x.dtype)
    known = kept.get("layers")
    if known is not None and known.parts == parts and known.setting == setting and known.watch():
        return known.arguments
    watch = Watch([block])
    if not (watch.can_tell and _is_known(parts, x)):
        return None
    with torch.no_grad():
        attention = attention_arguments(parts.norm1, parts.attention, parts.norm2, x.shape[0] * x.shape[1], in_panels)
        fc1, fc2 = ((in_panels(layer.weight, x.shape[0]), layer.bias) for layer in (parts.fc1, parts.fc2))
    exact = parts.activation.approximate == "none"
    activation = activation_index("gelu" if exact else "gelu_tanh")
    arguments = (*attention, *fc1, *fc2, activation, parts.fc1.out_features)
    kept["layers"] = _Block(parts, watch, setting, arguments)
    return arguments


def _is_known(parts: LayersParts, x: Tensor) -> bool:
    layers = (parts.attention.qkv, parts.attention.proj, parts.fc1, parts.fc2)
    if not all(type(layer) in _LINEAR for layer in layers) or type(parts.activation) is not nn.GELU:
        return False
    if not (is_plain_layer_norm(parts.norm1) and is_plain_layer_norm(parts.norm2)):
        return False
    tensors = [tensor for layer in (*layers, parts.norm1, parts.norm2) for tensor in (layer.weight, layer.bias)]
    here = all(tensor is None or (tensor.dtype, tensor.device) == (x.dtype, x.device) for tensor in tensors)
    fits = x.shape[2] == parts.fc2.out_features == parts.attention.proj.out_features
    return here and fits and has_panels(x.dtype, parts.fc2.in_features)
