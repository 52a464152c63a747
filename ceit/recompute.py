"""Gradient checkpointing that keeps BatchNorm's running statistics right."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_module(module: nn.Module, *args: Any, function: Callable[..., Any] | None = None) -> Any:
    """Call `module(*args)`, keeping only its inputs and recomputing the rest in the backward pass.

    Outputs, gradients and buffers are those of a plain call. torch.compile itself does not recompute what changes a
    buffer.

    Args:
        module: the module.
        *args: its arguments.
        function: called instead of the module; it may change no other buffers than the module's.
    """
    function = module if function is None else function
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, use_reentrant=False)
    return checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _buffers_unchanged(module))
    )


@contextmanager
def _buffers_unchanged(module: nn.Module) -> Iterator[None]:
    """Put back the buffers on leaving: BatchNorm would count the batch a second time when it is recomputed."""
    saved = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)
