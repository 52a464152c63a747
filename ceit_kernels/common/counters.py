"""Counters at zero, for launches whose program instances have to know who is the last (``partials``)."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import is_recording
from .stopwatch import is_capturing

__all__ = ["counters"]

_LIMIT = 256  # streams whose counters are kept

_kept: dict[tuple[torch.device, int, int], Tensor] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """Counters (count,), an int32 each, that are 0 for the next launch on the current stream; it has to leave them so.

    A stream's are kept, for its launches run one after another. A graph gets some of its own, zeroed by each replay,
    because it may run beside what the stream does next.
    """
    if is_recording():
        return torch.empty(count, dtype=torch.int32, device=device)
    if device.type != "cuda" or not torch.cuda.is_initialized() or is_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream, count
    found = _kept.get(key)
    if found is None:
        while len(_kept) >= _LIMIT:
            _kept.pop(next(iter(_kept)), None)
        found = _kept[key] = torch.zeros(count, dtype=torch.int32, device=device)
    return found
