"""Launching Triton kernels, and recording launches instead of performing them.

A recorded launch holds everything that the machine code and the memory traffic of a call depend on, so that both can be
examined where no GPU is.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Launch",
    "cdiv",
    "compute_capability",
    "has_launch_hooks",
    "is_recording",
    "launch",
    "nvidia_options",
    "one_publishes_for_all",
    "record_launches",
    "records_eager",
    "target_chip",
    "target_device",
    "this_thread",
]


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: the ``triton.jit`` function.
        grid: program instances along each axis.
        arguments: every argument by its name in the kernel, compile-time constants included.
        num_warps: warps of 32 threads per program instance.
        num_stages: depth of the software pipeline of its loops.
        registers: of a thread at most, on NVIDIA's chips.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int
    registers: int = 255


def cdiv(total: int, size: int) -> int:
    """How many of a size cover a total. Triton's own, made for device code too, takes ten times as long."""
    return -(-total // size)


class _ThisThread(threading.local):
    """What takes down the launches of a call in this thread (``plan``), if anything does."""

    tape: Any = None


this_thread = _ThisThread()
_recorder: list[Launch] | None = None
_recorded_chip = 90
_records_eager = False


@contextmanager
def record_launches(chip: int = 90, eager: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches made inside the block in a list; none of them is performed.

    Under ``torch._subclasses.FakeTensorMode`` this needs neither a GPU nor memory.

    Args:
        chip: compute capability, times ten, of the GPU that they would be made for.
        eager: record what calls launch in eager mode, whatever mode the tensors need.
    """
    global _recorder, _recorded_chip, _records_eager
    outer = _recorder, _recorded_chip, _records_eager
    _recorder, _recorded_chip, _records_eager = [], chip, eager
    try:
        yield _recorder
    finally:
        _recorder, _recorded_chip, _records_eager = outer


def is_recording() -> bool:
    """Whether launches are recorded instead of performed, for a GPU that need not be there."""
    return _recorder is not None


def records_eager() -> bool:
    """Whether launches are recorded as eager calls make them."""
    return _records_eager


def target_device(x: Tensor) -> tuple[str, int | None]:
    """Kind and index of the device that a call on ``x`` is for, a GPU's where launches are recorded."""
    if _recorder is not None:
        return "cuda", None
    return "cuda" if x.is_cuda else x.device.type, x.device.index


def compute_capability(device_index: int | None) -> int:
    """Compute capability, times ten, of a GPU, the recorded one's where launches are recorded."""
    if _recorder is not None or torch.version.hip is not None:
        return _recorded_chip
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


def target_chip(x: Tensor) -> int:
    """Compute capability, times ten, of the GPU that launches on the device of ``x`` are for; 90 without a GPU."""
    return compute_capability(x.device.index) if x.is_cuda else _recorded_chip


def has_launch_hooks() -> bool:
    """Whether something, such as Triton's profiler, is told of each launch by Triton's launcher."""
    knobs = sys.modules.get("triton.knobs")
    if knobs is None:
        return False
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    known: Mapping[str, Any],
    num_warps: int,
    num_stages: int = 2,
    registers: int = 255,
) -> None:
    """Launch ``kernel`` on the device of its tensors, on that device's current stream.

    It takes what it has a name for of ``known``; a pointer ``p_...`` that is not among them is None.
    """
    arguments = {name: known.get(name) if name.startswith("p_") else known[name] for name in kernel.arg_names}
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, arguments, num_warps, num_stages, registers))
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, **nvidia_options(num_warps, registers)}
    on_gpu = next((a for a in arguments.values() if isinstance(a, torch.Tensor) and a.is_cuda), None)
    with nullcontext() if on_gpu is None else torch.cuda.device(on_gpu.device):
        compiled = kernel[grid](**arguments, **options)
    if this_thread.tape is not None:
        this_thread.tape.add_launch(kernel, compiled, grid, list(arguments.values()), options)


def one_publishes_for_all() -> bool:
    """Whether a barrier and then a release by one thread publish the stores of a program instance's other warps too.

    On AMD's chips the barrier does not wait for the stores of other waves, and the release only for its own.
    """
    return torch.version.hip is None


def nvidia_options(num_warps: int, registers: int) -> dict[str, int]:
    """Compiler options for NVIDIA alone, none elsewhere.

    Left to itself the assembler may stop at 64 or 128 registers a thread and spill the rest, for more program instances
    at a time than there are.
    """
    if torch.version.hip is not None or num_warps > 8:
        return {}
    return {"maxnreg": registers}
