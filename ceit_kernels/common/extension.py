"""The compiled extension: where it is, and why it is not there."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

__all__ = ["describe_extension", "extension_problem", "has_kernel"]

_PACKAGE = Path(__file__).parent.parent


def _build_reason() -> str:
    """What the build said of itself."""
    record = _PACKAGE / "_build.json"
    return json.loads(record.read_text())["reason"] if record.exists() else "no record of the build"


@functools.cache
def _load() -> str | None:
    """Load the extension on first use; None if it is there, else what went wrong, in words for the user."""
    library = next(iter(sorted(_PACKAGE.glob("_native*.so"))), None)
    if library is None:
        return f"the compiled extension was not built: {_build_reason()}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the compiled extension does not load: {error}"
    return None


@torch.compiler.assume_constant_result
def has_kernel(operator: str, device_type: str) -> bool:
    """Whether compiled code serves ``ceit::<operator>`` on a kind of device."""
    _load()
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"ceit::{operator}", device_type.upper())
    except RuntimeError:  # neither the extension nor a call has made the operator known
        return False


def extension_problem(device_type: str) -> str:
    """Why the extension has nothing for a kind of device, for an error message."""
    return _load() or f"the compiled extension has no code for {device_type}: {_build_reason()}"


def describe_extension() -> str:
    """Whether the extension is there, with what was built, or why not."""
    return _load() or f"the compiled extension is loaded: {_build_reason()}"
