"""Launching Triton kernels, and recording launches instead of performing them.

A recorded launch holds everything that the machine code and the memory traffic of a call depend on, so that both can be
examined where no GPU is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Launch", "launch", "record_launches"]


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: the ``triton.jit`` function.
        grid: program instances along each axis.
        arguments: every argument by its name in the kernel, compile-time constants included.
        num_warps: warps of 32 threads per program instance.
        num_stages: depth of the software pipeline of its loops.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int


_recorder: list[Launch] | None = None


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect the launches made inside the block in a list; none of them is performed.

    Under ``torch._subclasses.FakeTensorMode`` this needs neither a GPU nor memory.
    """
    global _recorder
    outer, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = outer


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], *, num_warps: int, num_stages: int = 2
) -> None:
    """Launch ``kernel`` on the device of its tensors, on that device's current stream."""
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, dict(arguments), num_warps, num_stages))
        return
    on_gpu = next((a for a in arguments.values() if isinstance(a, torch.Tensor) and a.is_cuda), None)
    if on_gpu is None:
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
    else:
        with torch.cuda.device(on_gpu.device):
            kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
