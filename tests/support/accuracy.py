"""The error rule: against float64, a kernel may be at most twice as wrong as plain PyTorch in the same dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Below this many roundings of the largest value, plain PyTorch is right by luck.
_ROUNDINGS = 4


def assert_as_accurate(names: Sequence[str], fused: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]):
    for name, ours, theirs, truth in zip(names, fused, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype, name
        assert ours.shape == truth.shape, name
        assert torch.isfinite(ours).all(), name
        error, allowed = _error(ours, truth), 2 * _error(theirs, truth)
        slack = _ROUNDINGS * torch.finfo(ours.dtype).eps * truth.abs().max().item()
        assert error <= allowed + slack, f"{name}: error {error:.3g}, allowed {allowed:.3g} + {slack:.3g}"


def _error(result: Tensor, truth: Tensor) -> float:
    return (result.double() - truth).abs().max().item() if truth.numel() else 0.0
