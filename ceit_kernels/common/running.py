"""Running statistics, written as PyTorch's BatchNorm writes them.

Its kernels do not count that to autograd, only its counter of batches is added to. A pass in evaluation keeps them for
its backward pass, which may come after a batch in training; PyTorch goes on there, with what they are by then.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .calls import is_eager

__all__ = ["tell_counters", "uncounted"]


def uncounted(running: Tensor) -> Tensor:
    """A running statistic, to be written without its version being counted up. Compilers see it as it is."""
    return running.data if is_eager(running) else running


def tell_counters(counters: Iterable[Tensor | None]) -> None:
    """Tell autograd that a kernel has added a batch to the counters that are there."""
    torch.autograd.graph.increment_version([c for c in counters if c is not None and not c.is_inference()])
