"""Matrix products on the CPU, by the library that PyTorch carries (oneDNN), with weights packed once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["linear", "packed", "product", "transposed", "weight_gradient"]

torch.library.define("ceit::_transpose", "(Tensor x, Tensor(a!) out) -> ()")

_packed = WeakTensorKeyDictionary()


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(weight: Tensor, rows: int, constant: bool = False) -> Tensor:
    """The weight as oneDNN reads it fastest, packed once per version of it; for ``linear``.

    Args:
        weight: (N, K), float32 or bfloat16 for packing to do anything.
        rows: of the matrices that it is going to be multiplied with, about.
        constant: promises that nothing writes to the weight; a tensor made in inference mode cannot tell.
    """
    if not _has_onednn(weight.dtype) or isinstance(weight, FakeTensor):
        return weight
    if weight.is_inference() and not constant:
        return weight
    version = None if constant else (weight.data_ptr(), weight._version)
    entry = _packed.get(weight)
    if entry is None or entry[0] != version:
        with torch.no_grad():
            entry = version, torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        _packed[weight] = entry
    return entry[1]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` for a contiguous x (M, K) and a weight (N, K), packed or not and of any strides; (M, N).

    A transposed view costs nothing: what oneDNN likes best to read is W^T.
    """
    if weight.layout == torch._mkldnn or _has_onednn(x.dtype):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``A B`` for contiguous matrices; (M, N)."""
    return linear(a, b.t())


def transposed(x: Tensor) -> Tensor:
    """A contiguous transposed copy of a contiguous matrix (M, N): (N, M), float32, bfloat16 or float64."""
    out = x.new_empty(x.shape[1], x.shape[0])
    torch.ops.ceit._transpose(x, out)
    return out


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """``grad^T x`` for contiguous matrices (M, N) and (M, K): what a linear layer's weight (N, K) gets.

    Of the two the narrower is copied transposed, the wider read as it lies.
    """
    if grad.shape[1] <= x.shape[1]:
        return product(transposed(grad), x)
    return transposed(product(transposed(x), grad))
