"""An encoder block at inference on the CPU in one call, where each of its operators would run by compiled code.

One image takes a millisecond of a block in products and stages, and as much as a third of that in Python between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.weak import WeakTensorKeyDictionary

from .. import backends
from ..add_norm.module import is_plain_layer_norm
from ..attention import FusedAttention
from ..common.autocast import autocast_dtype
from ..common.products import packed
from ..common.registration import is_plain_call
from ..leff import FusedLeFF
from ..leff.folding import FoldedWeights, fold, is_kept
from ..leff.grid import token_grid
from ..leff.native.inference import bytes_in_cache
from ..leff.native.stages import activation_index, images_at_a_time
from ..linear import FusedLinear

__all__ = ["encoder_block_inference"]

torch.library.define(
    "ceit::_block_infer",
    "(Tensor x, Tensor? norm_weight1, Tensor? norm_bias1, float eps1, Tensor qkv_weight, Tensor? qkv_bias, int heads, "
    "float scale, Tensor projection_weight, Tensor? projection_bias, Tensor? norm_weight2, Tensor? norm_bias2, "
    "float eps2, Tensor weight1, Tensor bias1, Tensor taps, Tensor bias2, Tensor weight3, Tensor bias3, int first, "
    "int second, int height, int width, int images, Tensor(a!) out) -> ()",
)

_OPERATORS = ("norm", "linear", "attention", "leff")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Weights(NamedTuple):
    """What the call reads: norms' parameters in the type of sums, weights folded and packed."""

    version: tuple
    folded: FoldedWeights
    norm1: tuple[Tensor | None, Tensor | None]
    qkv: tuple[Tensor, Tensor | None]
    projection: tuple[Tensor, Tensor | None]
    norm2: tuple[Tensor | None, Tensor | None]
    leff: tuple[Tensor, ...]
    activations: tuple[int, int]
    images: int


_cache = WeakTensorKeyDictionary()


def encoder_block_inference(
    x: Tensor,
    norm1: nn.Module,
    attention: nn.Module,
    norm2: nn.Module,
    leff: nn.Module,
    grid_size: tuple[int, int] | None = None,
) -> Tensor | None:
    """``y = x + attention(norm1(x)); y + leff(norm2(y))`` (CeiT, section 3.3), or None where that takes other calls.

    It does where a gradient may be wanted, someone watches (hooks, a compiler, a dispatch mode), a module is not the
    fused or plain one that is known or is in training mode, or an operator of the block does not run natively.

    Args:
        x: tokens (B, P + H * W, C) on the CPU.
        norm1, norm2: LayerNorms over C.
        attention: a ``FusedAttention`` whose projections are ``FusedLinear``.
        leff: a ``FusedLeFF`` from C to C channels.
        grid_size: (H, W); a square if None.

    Raises:
        ValueError: the tokens make no such image.
    """
    if torch.is_grad_enabled() or not is_plain_call(x) or not _takes(x, norm1, attention, norm2, leff):
        return None
    height, width = token_grid(x.shape[1], leff.num_prefix_tokens, grid_size)
    weights = _weights(x, norm1, attention, norm2, leff, height * width)
    if weights is None:
        return None
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.ops.ceit._block_infer(
        x.contiguous(), *weights.norm1, norm1.eps, *weights.qkv, attention.num_heads, attention.scale,
        *weights.projection, *weights.norm2, norm2.eps, *weights.leff, *weights.activations, height, width,
        weights.images, out,
    )  # fmt: skip
    return out


def _takes(x: Tensor, norm1: nn.Module, attention: nn.Module, norm2: nn.Module, leff: nn.Module) -> bool:
    if type(attention) is not FusedAttention or type(leff) is not FusedLeFF or leff.layout != "tokens":
        return False
    if type(attention.qkv) is not FusedLinear or type(attention.proj) is not FusedLinear:
        return False
    if not (is_plain_layer_norm(norm1) and is_plain_layer_norm(norm2)):
        return False
    if any(module.training or any(getattr(module, kind) for kind in _HOOKS) for module in _modules(attention, leff)):
        return False
    channels = attention.proj.out_features
    if x.dim() != 3 or x.numel() == 0 or x.shape[2] != channels or leff.conv3.out_channels != channels:
        return False
    if autocast_dtype(x) is not None or _has_any_global_hook():
        return False
    return all(backends.choose(name, x, x.dtype).backend == "native" for name in _OPERATORS)


def _modules(attention: FusedAttention, leff: FusedLeFF) -> Iterator[nn.Module]:
    for module in (attention, leff):
        yield module
        yield from module._modules.values()


def _weights(
    x: Tensor, norm1: nn.Module, attention: FusedAttention, norm2: nn.Module, leff: FusedLeFF, tokens: int
) -> _Weights | None:
    """What was made of this version of every tensor; None if it cannot be told or their types differ."""
    layers = (norm1, attention.qkv, attention.proj, norm2)
    parts = leff.inference_parts()
    if parts is None:
        return None
    parameters, eps, activations = parts
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias)] + parameters
    present = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.is_inference() for tensor in present):
        return None
    addresses, versions = [t.data_ptr() for t in present], [t._version for t in present]
    version = (eps, activations, tokens, torch.get_num_threads(), addresses, versions)
    known = _cache.get(attention.qkv.weight)
    if known is None or known.version != version or not is_kept(parameters[0], known.folded):
        if any(tensor.dtype != x.dtype or tensor.device != x.device for tensor in present):
            return None
        known = _cache[attention.qkv.weight] = _make(version, layers, parameters, eps, activations, tokens)
    return known if x.dtype == attention.qkv.weight.dtype else None


@torch.no_grad()
def _make(
    version: tuple,
    layers: tuple[nn.Module, ...],
    parameters: list[Tensor | None],
    eps: tuple[float, ...],
    activations: tuple[str, str],
    tokens: int,
) -> _Weights:
    norm1, qkv, projection, norm2 = layers
    dtype = qkv.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    folded = fold(parameters, eps, dtype)
    images = images_at_a_time(tokens * folded.weight1.shape[0] * dtype.itemsize, bytes_in_cache)
    weight1, weight3 = (packed(weight, images * tokens, constant=True) for weight in (folded.weight1, folded.weight3))
    norms = [
        tuple(None if tensor is None else tensor.to(wide).contiguous() for tensor in (norm.weight, norm.bias))
        for norm in (norm1, norm2)
    ]
    linears = [(packed(layer.weight, images * tokens), layer.bias) for layer in (qkv, projection)]
    of_leff = (weight1, folded.bias1.to(dtype), folded.taps, folded.bias2, weight3, folded.bias3.to(dtype))
    indices = tuple(activation_index(name) for name in activations)
    return _Weights(version, folded, norms[0], linears[0], linears[1], norms[1], of_leff, indices, images)
