"""The time that the host takes for a call on a GPU, measured without one: ``python -m benchmarks.host``.

Everything runs but the compiler and the driver: Triton gets kernels that do nothing, and the tensors are on the CPU, so
small that PyTorch's own operators take about as long as their launch would. The driver's own time for a launch, some
microseconds, is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from ceit import layers
from ceit_kernels import backends, fuse, use_backend

_CHANNELS, _TOKENS = 192, 5  # of CeiT-T, whose weights are so small that copying them takes no time
launches = 0


class _Kernel(CompiledKernel):
    """A compiled kernel that does nothing."""

    function = module = None
    packed_metadata = ()

    def __init__(self) -> None:
        self._run = _count_launch

    def launch_metadata(self, *args: object) -> None:
        return None

    def _init_handles(self) -> None:
        pass


def _count_launch(*args: object) -> None:
    global launches
    launches += 1


@contextmanager
def stubbed_gpu() -> Iterator[None]:
    """Serve tensors on the CPU by Triton, which compiles and launches nothing. It leaves its mark on the process."""
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        utils=SimpleNamespace(unload_module=lambda module: None),
    )
    triton.runtime.driver.set_active(driver)
    with (
        mock.patch("triton.compiler.compile", side_effect=lambda *args, **options: _Kernel()),
        mock.patch.object(backends, "_INTERPRETING", True),  # or Triton would not take tensors on the CPU
        use_backend("triton"),
    ):
        yield


def calls() -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    leff = fuse(layers.LocallyEnhancedFeedForward(_CHANNELS, 4 * _CHANNELS)).half()
    serving = fuse(layers.LocallyEnhancedFeedForward(_CHANNELS, 4 * _CHANNELS)).half().eval().requires_grad_(False)
    add_norm, norm = fuse(layers.AddNorm()), nn.LayerNorm(_CHANNELS).half()
    x, branch, grad = (torch.randn(2, _TOKENS, _CHANNELS).half() for _ in range(3))
    x.requires_grad_(), branch.requires_grad_()
    of_leff, of_norm = [x, *leff.parameters()], [x, branch, *norm.parameters()]

    def inference() -> object:
        with torch.no_grad():
            return serving(x)

    return {
        "LeFF training step": lambda: torch.autograd.grad(leff(x), of_leff, grad),
        "LeFF inference": inference,
        "add_norm training step": lambda: torch.autograd.grad(add_norm(x, branch, norm), of_norm, (grad, grad)),
    }


def microseconds(call: Callable[[], object], repetitions: int) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each call."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=300, help="calls of each that are timed")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    figures = {}
    with stubbed_gpu():
        for name, call in calls().items():
            for _ in range(10):
                call()
            before = launches
            call()
            figures[name] = {"launches": launches - before, "us": microseconds(call, options.repetitions)}
    if options.json:
        print(json.dumps(figures))
        return 0
    for name, figure in figures.items():
        print(f"{name:24}{figure['us']:8.0f} us of the host, {figure['launches']:3} launches by Triton, none performed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
