"""Matmuls on the CPU, by this project's GEMM (csrc/cpu/gemm) where it is faster than PyTorch's."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IDENTITY", "linear", "linear_activation", "matmul", "prepack_linear", "weight_gradient"]

torch.library.define(
    "ceit::_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? prepacked, int out_features, int activation) -> Tensor",
)
torch.library.define("ceit::_linear_prepack", "(Tensor weight, Tensor? bias) -> Tensor")
torch.library.define("ceit::_matmul", "(Tensor a, Tensor b) -> Tensor")
torch.library.define("ceit::_weight_gradient", "(Tensor grad, Tensor x) -> Tensor")

IDENTITY = 6  # the index of no activation, see leff/activations.py
_FEW = 48  # rows, a matmul of which costs less than to prepack a weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, prepacked: Tensor | None = None) -> Tensor:
    """``x W^T + b`` for a contiguous x (M, K) and a weight (N, K) of one dtype; (M, N).

    The call prepacks the weight, unless ``prepacked`` is what ``prepack_linear`` made of it and the bias.
    """
    if prepacked is None and x.shape[0] < _FEW:
        return F.linear(x, weight, bias if bias is None else bias.to(x.dtype))
    return torch.ops.ceit._linear(x, weight, bias, prepacked, weight.shape[0], IDENTITY)


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """``linear``, and an activation by its index behind it, while the result is in registers."""
    return torch.ops.ceit._linear(x, weight, bias, None, weight.shape[0], activation)


def prepack_linear(weight: Tensor, bias: Tensor | None) -> Tensor:
    """A weight (N, K) and a bias as this processor's GEMM reads them, in a copy; for ``linear``."""
    return torch.ops.ceit._linear_prepack(weight, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``A B`` for contiguous matrices; (M, N)."""
    return torch.ops.ceit._matmul(a, b) if _is_ours(a.dtype) else a @ b


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """``grad^T x`` for contiguous matrices (M, N) and (M, K): what a linear layer's weight (N, K) gets.

    Where this project multiplies, sums in bfloat16 stay in float32; the narrower of the two is copied transposed, the
    wider read as it lies.
    """
    return torch.ops.ceit._weight_gradient(grad, x) if _is_ours(grad.dtype) else grad.t() @ x


def _is_ours(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (dtype == torch.bfloat16 and not _has_bfloat16())


@cache
def _has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16; without AVX-512 PyTorch has loops that take forty times as long."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
