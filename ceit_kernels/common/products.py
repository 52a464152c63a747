"""Matrix products on the CPU, by the library that PyTorch carries (oneDNN), with weights packed once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils.weak import WeakTensorKeyDictionary

from .extension import has_kernel

__all__ = [
    "has_panels",
    "in_panels",
    "linear",
    "once_per_version",
    "packed",
    "product",
    "transposed",
    "weight_gradient",
]

torch.library.define("ceit::_transpose", "(Tensor x, Tensor(a!) out) -> ()")
torch.library.define("ceit::_has_panels", "(Tensor x) -> bool")
torch.library.define("ceit::_product", "(Tensor a, Tensor b, Tensor? bias) -> Tensor")
torch.library.define("ceit::_weight_gradient", "(Tensor grad, Tensor x) -> Tensor")

_PANEL = 64  # columns, as csrc/cpu/panels has them
_TOGETHER = {torch.float32: 1, torch.bfloat16: 2}  # terms of a sum that lie side by side
_FEW = 48  # rows, of which a product costs less than to transpose a weight
_packed, _in_panels, _made = (WeakTensorKeyDictionary() for _ in range(3))


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
    return _once(
        _packed, weight, constant, lambda: torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    )


def in_panels(weight: Tensor, rows: int, constant: bool = False) -> Tensor:
    """The weight for compiled code that goes through several products at a time; arguments as for ``packed``.

    In panels where such code multiplies bands of rows in cache by itself, see ``has_panels``: float32 (P, K, 64),
    bfloat16, with the terms in pairs, (P, K / 2, 128). Packed elsewhere.
    """
    if isinstance(weight, FakeTensor) or not has_panels(weight.dtype, weight.shape[1]):
        return packed(weight, rows, constant)

    def make() -> Tensor:
        together = _TOGETHER[weight.dtype]
        rows = F.pad(weight.detach(), (0, 0, 0, -weight.shape[0] % _PANEL))
        return rows.unflatten(0, (-1, _PANEL)).unflatten(2, (-1, together)).transpose(1, 2).flatten(2).contiguous()

    if weight.is_inference() and not constant:
        return make()
    return _once(_in_panels, weight, constant, make)


def has_panels(dtype: torch.dtype, *terms: int) -> bool:
    """Whether ``in_panels`` makes panels of a dtype's weights, and does not only pack them.

    It does in float32 on a processor with AVX-512, in bfloat16 on one that multiplies it (AVX512-BF16), unless
    oneDNN is switched off (``torch.backends.mkldnn.flags``).

    Args:
        terms: of the sums, the weights' K, even in bfloat16.
    """
    together = _TOGETHER.get(dtype)
    if together is None or not torch.backends.mkldnn.enabled or not _has_panels(dtype):
        return False
    return not any(count % together for count in terms)


@cache
def _has_panels(dtype: torch.dtype) -> bool:
    if not has_kernel("_has_panels", "cpu"):
        return False
    with no_dispatch():  # the first to ask may be a mode of fake tensors
        return torch.ops.ceit._has_panels(torch.empty(0, dtype=dtype, device="cpu"))


def once_per_version(weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """``make(weight)``, made anew only where the weight has been written to since; without a gradient."""
    return _once(_made, weight, False, lambda: make(weight.detach()))


def _once(kept: WeakTensorKeyDictionary, weight: Tensor, constant: bool, make: Callable[[], Tensor]) -> Tensor:
    """What is made of a weight, once per version of it."""
    version = None if constant else (weight.data_ptr(), weight._version)
    entry = kept.get(weight)
    if entry is None or entry[0] != version:
        with torch.no_grad():
            entry = kept[weight] = version, make()
    return entry[1]


def _multiplies_bands(x: Tensor) -> bool:
    """Whether matrices are multiplied in cache, band by band, as they lie."""
    return x.dtype == torch.float32 and has_panels(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` for a contiguous x (M, K) and a weight (N, K), packed or not and of any strides; (M, N).

    A transposed view costs nothing: what oneDNN likes best to read is W^T.
    """
    if weight.layout == torch.strided and _multiplies_bands(x) and x.shape[0] >= _FEW:
        return torch.ops.ceit._product(
            x, transposed(weight) if weight.is_contiguous() else weight.t().contiguous(), bias
        )
    if weight.layout == torch._mkldnn or _has_onednn(x.dtype):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``A B`` for contiguous matrices; (M, N)."""
    if _multiplies_bands(a):
        return torch.ops.ceit._product(a, b, None)
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
    if _multiplies_bands(grad):
        return torch.ops.ceit._weight_gradient(grad, x)
    if grad.shape[1] <= x.shape[1]:
        return product(transposed(grad), x)
    return transposed(product(transposed(x), grad))
