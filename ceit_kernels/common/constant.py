"""Functions whose results ``torch.compile`` takes as constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["constant_result"]

_Function = TypeVar("_Function", bound=Callable)


def constant_result(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result``, which imports the compiler: as long as importing PyTorch itself."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
