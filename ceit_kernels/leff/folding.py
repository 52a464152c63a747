"""LeFF's weights for inference: each BatchNorm folded into its convolution, once per version of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["FoldedWeights", "fold", "folded_before", "forget", "is_kept", "parameters_per_layer"]

# weight and bias of the convolution; weight, bias, running mean and running variance of its norm
parameters_per_layer = 6


class FoldedWeights(NamedTuple):
    """What the kernels read: biases and taps in float32 (float64 for float64), weights in the products' dtype."""

    weight1: Tensor  # (E, C)
    bias1: Tensor  # (E,)
    taps: Tensor  # (k * k, E), so that neighbouring channels are neighbours in memory
    bias2: Tensor  # (E,)
    weight3: Tensor  # (O, E)
    bias3: Tensor  # (O,)


_cache = WeakTensorKeyDictionary()


def fold(parameters: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> FoldedWeights:
    """Fold, or return what was folded from the same version of every tensor.

    Args:
        parameters: ``parameters_per_layer`` tensors for each of the three convolutions, None where it has none.
        eps: of the three norms.
        dtype: what products compute in.
    """
    version = _version(parameters, eps, dtype)
    known = _find(parameters[0], version)
    if known is not None:
        return known
    with torch.no_grad():
        folded = _fold(parameters, eps, dtype)
    # What is computed while a CUDA graph is captured holds values only when the graph is replayed.
    if version is not None and not _capturing():
        _cache[parameters[0]] = (version, folded)
    return folded


def folded_before(
    parameters: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype
) -> FoldedWeights | None:
    """What ``fold`` made of the same version of every tensor, if it did; they have been checked then."""
    return _find(parameters[0], _version(parameters, eps, dtype))


def _find(weight: Tensor, version: tuple | None) -> FoldedWeights | None:
    entry = _cache.get(weight)
    return entry[1] if entry is not None and version is not None and entry[0] == version else None


def is_kept(weight: Tensor, folded: FoldedWeights) -> bool:
    """Whether what was folded from the parameters whose first is ``weight`` has not been dropped or replaced since."""
    entry = _cache.get(weight)
    return entry is not None and entry[1] is folded


def forget(weight: Tensor) -> None:
    """Drop what was folded from the parameters whose first is ``weight``."""
    _cache.pop(weight, None)


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _version(parameters: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> tuple | None:
    """What changes whenever a tensor is replaced or written to in place; None if that cannot be told."""
    present = [t for t in parameters if t is not None]
    if any(t.is_inference() for t in present):
        return None
    return (dtype, tuple(eps), tuple(map(_address, present)), tuple([t._version for t in present]))


def _address(tensor: Tensor) -> int:
    return 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()


def _fold(parameters: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype) -> FoldedWeights:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights, biases = [], []
    for i, layer_eps in enumerate(eps):
        layer = parameters[i * parameters_per_layer : (i + 1) * parameters_per_layer]
        wide_layer = (None if tensor is None else tensor.detach().to(wide) for tensor in layer)
        weight, bias, norm_weight, norm_bias, mean, variance = wide_layer
        weight = weight.flatten(1)
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
        if mean is not None:
            scale = torch.rsqrt(variance + layer_eps)
            scale = scale if norm_weight is None else scale * norm_weight
            weight = weight * scale[:, None]
            bias = (bias - mean) * scale
            bias = bias if norm_bias is None else bias + norm_bias
        weights.append(weight)
        biases.append(bias.contiguous())
    return FoldedWeights(
        weights[0].to(dtype).contiguous(),
        biases[0],
        weights[1].t().contiguous(),
        biases[1],
        weights[2].to(dtype).contiguous(),
        biases[2],
    )
