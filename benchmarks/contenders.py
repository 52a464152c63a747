"""What the benchmarks time: one phase of a module, plain and fused, on the device at hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ceit_kernels import fuse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
CONTENDERS = ("plain", "fused")
PHASES = ("inference", "training")


def make_call(module: nn.Module, x: Tensor, contender: str, phase: str) -> Callable[[], Tensor]:
    """A call that runs one phase and waits for it; its result is the output.

    The module and its inputs stay as they are. A wrong contender is not timed: its output is compared with the plain
    module's first.
    """
    plain = copy.deepcopy(module).to(x.device, x.dtype).train(phase == "training")
    candidate = copy.deepcopy(plain)
    if contender == "fused":
        candidate = fuse(candidate)
    call = _training_step(candidate, x) if phase == "training" else _inference(candidate, x)
    expected = _training_step(plain, x)() if phase == "training" else _inference(plain, x)()
    tolerance = 1e-4 if x.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(call(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    return call


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _inference(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.inference_mode():
            out = module(x)
        _wait()
        return out

    return call


def _training_step(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Forward and backward, without an optimizer's step, so that every round does the same."""

    def call() -> Tensor:
        module.zero_grad(set_to_none=True)
        out = module(x)
        out.float().square().mean().backward()
        _wait()
        return out.detach()

    return call
