"""Times that an H100 would take by its bandwidth, its tensor cores and its launches: modelled, not measured."""

from __future__ import annotations

from collections.abc import Sequence

from .counting import Kernel

__all__ = ["BYTES_PER_SECOND", "FLOPS_PER_SECOND", "LAUNCH_SECONDS", "modelled_seconds"]

BYTES_PER_SECOND = 3.0e12
FLOPS_PER_SECOND = 790e12  # of dense products in bfloat16 and float16
LAUNCH_SECONDS = 2e-6  # between the end of a kernel and the start of the next


def modelled_seconds(kernels: Sequence[Kernel]) -> float:
    """The least that these kernels take one after another: each its bytes' or its flops' time, and a launch."""
    return sum(
        max(kernel.bytes / BYTES_PER_SECOND, kernel.flops / FLOPS_PER_SECOND) + LAUNCH_SECONDS for kernel in kernels
    )
