"""What autocast asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from .constant import constant_result

__all__ = ["autocast_dtype", "is_autocast_enabled"]


def is_autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; it never is where there is none, as on the meta device."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return False
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


@constant_result  # torch.compile of PyTorch 2.10 cannot look into it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What matmuls of ``x`` compute in under autocast; None where autocast is off or leaves ``x`` alone."""
    device_type = "cuda" if x.is_cuda else x.device.type
    if x.dtype == torch.float64 or not is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
