"""What autocast asks for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autocast_dtype"]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What products on ``x`` compute in under autocast; None where autocast is off or leaves ``x`` alone."""
    device_type = "cuda" if x.is_cuda else x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device_type):
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
