"""Counters at zero, for launches whose program instances have to know who is the last (``partials``)."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .launch import is_recording
from .stopwatch import is_capturing

__all__ = ["counters"]

_LIMIT = 256  # streams whose counters are kept
_OF_GRAPHS = 2**18  # counters of a device that are for graphs, a megabyte
_ALIGNED = 32  # counters, so that each piece starts where a tensor of its own might

_kept: dict[tuple[torch.device, int, int], Tensor] = {}
_left: dict[torch.device, Tensor] = {}  # of those for graphs what no graph has
_lock = threading.Lock()


def counters(count: int, device: torch.device, eager: bool = True) -> Tensor:
    """Counters (count,), an int32 each, that are 0 for the next launches on the current stream, which run one after
    another and each leave them so.

    A stream's are kept for all its eager calls. A captured call gets some that no other call ever gets, because a graph
    may run beside whatever else there is, as may branches of one graph. They are memory that is zeroed once and
    outlives every graph; once that is used up, and where a call is not eager, since a compiler's graphs account for all
    that lives in their memory, each call zeroes some of its own.
    """
    if is_recording():
        return torch.empty(count, dtype=torch.int32, device=device)
    if not eager or device.type != "cuda" or not torch.cuda.is_initialized():
        return _zeros(count, device)
    if is_capturing():
        return _of_graph(count, device)
    key = device, torch.cuda.current_stream(device).cuda_stream, count
    found = _kept.get(key)
    if found is None:
        if device not in _left:
            left = _zeros(_OF_GRAPHS, device)
            torch.cuda.current_stream(device).synchronize()  # whatever stream a graph will run on
            _left.setdefault(device, left)
        while len(_kept) >= _LIMIT:
            _kept.pop(next(iter(_kept)), None)
        found = _kept[key] = _zeros(count, device)
    return found


def _zeros(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def _of_graph(count: int, device: torch.device) -> Tensor:
    with _lock:
        left, taken = _left.get(device), -(-count // _ALIGNED) * _ALIGNED
        if left is None or len(left) < taken:
            return _zeros(count, device)
        _left[device] = left[taken:]
    return left[:count]
