"""The compiled extension: where it is, and why it is not there."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from .constant import constant_result
from .launch import is_recording

__all__ = ["cpu_code", "describe_extension", "extension_problem", "has_kernel"]

torch.library.define("ceit::_cpu_code", "() -> str")

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


@constant_result
def has_kernel(operator: str, device_type: str) -> bool:
    """Whether compiled code serves ``ceit::<operator>`` on a kind of device, as it does where launches are recorded."""
    if is_recording():
        return True
    _load()
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"ceit::{operator}", device_type.upper())
    except RuntimeError:  # neither the extension nor a call has made the operator known
        return False


def extension_problem(device_type: str) -> str:
    """Why the extension has nothing for a kind of device, for an error message."""
    return _load() or f"the compiled extension has no code for {device_type}: {_build_reason()}"


def cpu_code() -> str | None:
    """Which of its code the extension runs on this processor: "avx512bf16", "avx512", "avx2" or "baseline".

    The best that the processor has, or what the environment variable CEIT_KERNELS_CPU names if that is less. None where
    there is no extension.
    """
    return torch.ops.ceit._cpu_code() if _load() is None else None


def describe_extension() -> str:
    """Whether the extension is there, with what was built and which of it this processor runs, or why not."""
    return _load() or f"the compiled extension is loaded: {_build_reason()}; the CPU runs its {cpu_code()} code"
