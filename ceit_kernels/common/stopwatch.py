"""How long a GPU takes for a call: the GPU alone, whatever the host takes to launch it."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

__all__ = ["gpu_seconds", "has_clock", "is_capturing"]

_CALLS, _REPLAYS = 20, 5


def has_clock(x: Tensor) -> bool:
    """Whether calls on the device of a tensor can be timed."""
    return x.is_cuda and torch.cuda.is_available()


def is_capturing() -> bool:
    """Whether launches on the current stream become part of a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def gpu_seconds(run: Callable[[], Any]) -> float:
    """Seconds of a call on the current GPU, with nothing of what it reads in the L2 cache.

    By events around a graph of 20 calls, each behind a sweep through the cache, less the time of the sweeps. The call
    is made a few times before, for what it compiles.
    """
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sweep = torch.empty(2 * cache_bytes, dtype=torch.uint8, device="cuda").zero_

    def swept() -> None:
        sweep()
        run()

    return max(0.0, _seconds(swept) - _seconds(sweep)) / _CALLS


def _seconds(run: Callable[[], Any]) -> float:
    """The median time of a graph of ``_CALLS`` calls."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        run()
        run()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # What other threads do meanwhile, such as pinning memory, is no part of it.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_CALLS):
            run()
    graph.replay()
    times = []
    for _ in range(_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)
