"""Which implementation serves a call, and why: the only place that decides.

Every operator has a reference in plain PyTorch, which runs anywhere. ``IMPLEMENTED`` lists what it has beside that.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .common.extension import describe_extension, extension_problem, has_kernel
from .common.launch import is_recording

__all__ = [
    "BACKENDS",
    "OPERATORS",
    "PHASES",
    "BackendError",
    "Choice",
    "OperatorStatus",
    "Status",
    "choose",
    "current_backend",
    "fast_operators",
    "leave_to_reference",
    "native_operator",
    "require",
    "status",
    "use_backend",
]

BACKENDS = ("auto", "reference", "native", "triton")

PHASES = ("inference", "training")

# What each operator is implemented in beside plain PyTorch, the best first, and for which phases.
IMPLEMENTED: dict[str, dict[str, tuple[str, ...]]] = {
    "leff": {"triton": PHASES, "native": PHASES},
    "lca": {"triton": PHASES, "native": PHASES},
    "i2t": {"native": PHASES},
    "add_norm": {"triton": PHASES, "native": PHASES},
    "linear": {"native": PHASES},
    "attention": {"native": PHASES},
}
OPERATORS = tuple(IMPLEMENTED)


class _Native(NamedTuple):
    """Code for a kind of device, and what it serves; a compiled operator tells whether it is there, if there is one."""

    operator: str | None
    phases: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NATIVE = {
    "leff": {"cpu": _Native("_leff_train", PHASES, _CPU_DTYPES)},
    "i2t": {
        "cuda": _Native("_i2t_forward", PHASES, _CUDA_DTYPES),
        "cpu": _Native("_i2t_forward_cpu", PHASES, _CPU_DTYPES),
    },
    "lca": {"cpu": _Native(None, PHASES, _CPU_DTYPES)},
    "add_norm": {"cpu": _Native("_add_norm_forward", PHASES, _CPU_DTYPES)},
    "linear": {"cpu": _Native("_transpose", PHASES, _CPU_DTYPES)},
    "attention": {"cpu": _Native("_attention", PHASES, _CPU_DTYPES)},
}
_DEVICE_NAMES = {"cpu": "the CPU", "cuda": "a CUDA GPU"}

_ENVIRONMENT_VARIABLE = "CEIT_KERNELS_BACKEND"
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads the variable when a kernel is defined, so a later change has no effect.
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


class BackendError(RuntimeError):
    """A backend was asked for that cannot serve the call."""


class Choice(NamedTuple):
    """The backend that serves a call, and why."""

    backend: str
    reason: str


def _parse(setting: str, source: str) -> dict[str, str]:
    """``"triton"`` for every operator, or ``"lca=triton,leff=reference"`` for some, as a dictionary."""
    parsed = {}
    for part in setting.split(","):
        operator, equals, backend = part.strip().rpartition("=")
        if backend not in BACKENDS:
            raise ValueError(f"{source}: unknown backend {backend!r} in {setting!r}, expected one of {BACKENDS}")
        if equals and operator not in OPERATORS:
            raise ValueError(f"{source}: unknown operator {operator!r} in {setting!r}, expected one of {OPERATORS}")
        parsed.update(dict.fromkeys([operator] if equals else OPERATORS, backend))
    return parsed


_setting = {**_parse("auto", ""), **_parse(os.environ.get(_ENVIRONMENT_VARIABLE) or "auto", _ENVIRONMENT_VARIABLE)}

# What the setting has chosen so far: deciding again would cost a small call more than its arithmetic.
_chosen: dict[tuple[object, ...], Choice] = {}


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Choose the backend of the fused operators inside a ``with`` block, in the whole process.

    A call that the backend cannot serve raises ``BackendError`` with the reason; only ``"auto"`` chooses another.

    Args:
        backend: ``"auto"`` (the fastest that can run), ``"reference"`` (plain PyTorch), ``"native"`` or ``"triton"``.
            ``"triton"`` also takes CPU tensors when the environment has TRITON_INTERPRET=1. For some operators only:
            ``"lca=triton,leff=reference"``. The environment variable CEIT_KERNELS_BACKEND sets the default likewise.

    Raises:
        ValueError: unknown backend or operator.
    """
    global _setting
    outer, _setting = _setting, {**_setting, **_parse(backend, "backend")}
    _chosen.clear()
    try:
        yield
    finally:
        _setting = outer
        _chosen.clear()


def current_backend(operator: str) -> str:
    """The backend that is set for an operator, ``"auto"`` unless someone chose."""
    return _setting[operator]


@torch.compiler.assume_constant_result
def _old_gpu(device_index: int | None) -> str | None:
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device_index)
    return None if major >= 8 else f"the GPU has compute capability {major}.{minor}, the kernels need 8.0"


def _triton_refusal(device_type: str, device_index: int | None, dtype: torch.dtype) -> str | None:
    if not _HAS_TRITON:
        return "triton is not installed"
    if dtype not in _TRITON_DTYPES:
        return f"the kernels compute in float32, float16, bfloat16 and float64, not in {dtype}"
    if device_type == "cuda":
        return None if is_recording() else _old_gpu(device_index)
    if device_type != "cpu":
        return f"the tensor is on {device_type}, Triton needs a CUDA GPU"
    if not _INTERPRETING:
        return "the tensor is on the CPU, Triton needs a CUDA GPU (or TRITON_INTERPRET=1 before import, to debug)"
    if dtype == torch.bfloat16:
        return "Triton's interpreter computes wrongly in bfloat16"
    return None


def _native_refusal(
    operator: str, phase: str, device_type: str, device_index: int | None, dtype: torch.dtype
) -> str | None:
    devices = _NATIVE[operator]
    if is_recording() and device_type in devices:
        return None
    if device_type not in devices:
        needed = " or ".join(_DEVICE_NAMES[device] for device in devices)
        return f"the tensor is on the {device_type.upper()}, {operator}'s compiled kernels need {needed}"
    native = devices[device_type]
    if native.operator is not None and not has_kernel(native.operator, device_type):
        return extension_problem(device_type)
    if phase not in native.phases:
        return f"{operator} has no native implementation of {phase} on the {device_type.upper()}"
    if dtype not in native.dtypes:
        names = [str(name).removeprefix("torch.") for name in native.dtypes]
        return f"the kernels compute in {', '.join(names[:-1])} and {names[-1]}, not in {dtype}"
    return _old_gpu(device_index) if device_type == "cuda" else None


def _refusal(
    operator: str,
    phase: str,
    backend: str,
    device_type: str,
    device_index: int | None,
    dtype: torch.dtype,
    limit: str | None,
) -> str | None:
    """Why a backend cannot serve a call, or None if it can."""
    if backend == "reference":
        return None
    phases = IMPLEMENTED[operator].get(backend, ())
    if phase not in phases:
        return f"{operator} has no {backend} implementation" + (f" of {phase}" if phases else "")
    if limit is not None:
        return limit
    if backend == "native":
        return _native_refusal(operator, phase, device_type, device_index, dtype)
    return _triton_refusal(device_type, device_index, dtype)


def _decide(
    operator: str, phase: str, device_type: str, device_index: int | None, dtype: torch.dtype, limit: str | None
) -> Choice:
    wanted = _setting[operator]
    if wanted != "auto":
        refusal = _refusal(operator, phase, wanted, device_type, device_index, dtype, limit)
        if refusal is not None:
            leave_to_reference(operator, refusal)
        return Choice(wanted, "asked for")
    refusals = []
    for backend in IMPLEMENTED[operator]:
        devices = _NATIVE[operator] if backend == "native" else ("cuda",)
        if device_type == "cpu" and "cpu" not in devices:
            refusals.append(f"{backend}: the tensor is on the CPU")
            continue
        refusal = _refusal(operator, phase, backend, device_type, device_index, dtype, limit)
        if refusal is None:
            return Choice(backend, "the fastest that can run")
        refusals.append(f"{backend}: {refusal}")
    return Choice("reference", "; ".join(refusals) or f"{operator} has no other implementation yet")


def _place(x: Tensor) -> tuple[str, int | None]:
    if is_recording():
        return "cuda", None
    return ("cuda", x.device.index) if x.is_cuda else (x.device.type, None)


def choose(operator: str, x: Tensor, dtype: torch.dtype, limit: str | None = None, phase: str = "inference") -> Choice:
    """The backend for a call of an operator.

    Args:
        operator: one of ``OPERATORS``.
        x: a tensor of the call, for its device.
        dtype: what the call computes in, which is not the dtype of ``x`` under autocast.
        limit: why the call is beyond every backend but the reference, if it is.
        phase: ``"inference"``, or ``"training"`` for a call that needs gradients or statistics, where that matters.

    Raises:
        BackendError: the backend that was asked for cannot serve the call.
    """
    if torch.compiler.is_compiling() or is_recording():
        return _decide(operator, phase, *_place(x), dtype, limit)
    call = operator, phase, x.device, x.is_cuda, dtype, limit
    choice = _chosen.get(call)
    if choice is None:
        choice = _chosen[call] = _decide(operator, phase, *_place(x), dtype, limit)
    return choice


def leave_to_reference(operator: str, reason: str) -> None:
    """Raise ``BackendError`` where another backend was asked for than the reference, which ``reason`` leaves a call to.

    As ``choose`` with that limit, for a call of which nothing else is known.
    """
    wanted = _setting[operator]
    if wanted not in ("auto", "reference"):
        raise BackendError(f"{operator}: backend {wanted!r} was asked for but cannot run: {reason}")


def require(operator: str, backend: str, x: Tensor, dtype: torch.dtype, limit: str | None = None) -> None:
    """Raise ``BackendError`` unless ``backend`` has a registered operator that can serve the call in some phase."""
    refusal = "it is plain PyTorch, call the function in ceit_kernels instead" if backend == "reference" else None
    refusal = refusal or _refusal(operator, "inference", backend, *_place(x), dtype, limit)
    if refusal is None and backend == "native" and native_operator(operator, x) is None:
        refusal = "it is made of PyTorch's operators, call the function in ceit_kernels instead"
    if refusal is not None:
        raise BackendError(f"ceit::{operator}: backend {backend!r} cannot run: {refusal}")


def native_operator(operator: str, x: Tensor) -> str | None:
    """The compiled operator behind an operator's native implementation on the device of a tensor, if there is one."""
    native = _NATIVE.get(operator, {}).get(_place(x)[0])
    return None if native is None else native.operator


@dataclass(frozen=True)
class OperatorStatus:
    """What would run a phase of an operator on one kind of device; ``backend`` is None where nothing would."""

    operator: str
    phase: str
    device: str
    backend: str | None
    reason: str


class Status(list[OperatorStatus]):
    """Rows of ``OperatorStatus``; its text is a table, and a line on the compiled extension."""

    extension: str = ""

    def __str__(self) -> str:
        rows = [("operator", "phase", "device", "backend", "why")]
        rows += [(row.operator, row.phase, row.device, row.backend or "none", row.reason) for row in self]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row[:4], widths, strict=True)), row[4]]) for row in rows]
        return "\n".join([*lines, self.extension])


def status(dtype: torch.dtype = torch.float32) -> Status:
    """What would run each operator on this machine for inputs of ``dtype``, and why."""
    places = itertools.product(OPERATORS, PHASES, ("cpu", "cuda"))
    table = Status(_operator_status(operator, phase, device, dtype) for operator, phase, device in places)
    table.extension = describe_extension()
    return table


def _operator_status(operator: str, phase: str, device: str, dtype: torch.dtype) -> OperatorStatus:
    if device == "cuda" and not torch.cuda.is_available():
        return OperatorStatus(operator, phase, device, None, "no CUDA GPU is available to PyTorch")
    try:
        choice = _decide(operator, phase, device, None, dtype, None)
    except BackendError as error:
        return OperatorStatus(operator, phase, device, None, str(error))
    return OperatorStatus(operator, phase, device, *choice)


def fast_operators() -> set[str]:
    """The operators that something faster than plain PyTorch can run here, in some phase, as ``status`` has it."""
    return {row.operator for row in status() if row.backend not in (None, "reference")}
