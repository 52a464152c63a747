"""Which implementation serves a call, and why: the only place that decides.

Every operator has a reference in plain PyTorch, which runs anywhere; ``operators.OPERATORS`` lists what it has beside.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .common.choice import describe_findings
from .common.constant import constant_result
from .common.extension import describe_extension, extension_problem, has_kernel
from .common.launch import compute_capability, is_recording, target_device
from .operators import OPERATORS

__all__ = [
    "BACKENDS",
    "PROVEN_AMD_CHIPS",
    "BackendError",
    "Choice",
    "OperatorStatus",
    "Status",
    "choose",
    "compiled_operator",
    "current_backend",
    "fast_operators",
    "leave_to_reference",
    "refusals",
    "require",
    "status",
    "use_backend",
]

BACKENDS = ("auto", "reference", "native", "triton", "library")
_BY_TRITON = ("triton", "library")  # the latter with GEMMs of PyTorch

# For which the machine code of every kernel is looked at.
PROVEN_AMD_CHIPS = ("gfx942", "gfx90a")
_DEVICE_NAMES = {"cpu": "the CPU", "cuda": "a CUDA GPU"}
_ENVIRONMENT_VARIABLE = "CEIT_KERNELS_BACKEND"
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
    if not isinstance(setting, str):
        raise TypeError(f"{source}: expected a string, got {setting!r}")
    parsed = {}
    for part in setting.split(","):
        operator, equals, backend = part.strip().rpartition("=")
        if backend not in BACKENDS:
            raise ValueError(f"{source}: unknown backend {backend!r} in {setting!r}, expected one of {BACKENDS}")
        if equals and operator not in OPERATORS:
            raise ValueError(
                f"{source}: unknown operator {operator!r} in {setting!r}, expected one of {tuple(OPERATORS)}"
            )
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
        backend: ``"auto"`` (the fastest that can run), ``"reference"`` (plain PyTorch), ``"native"``, ``"triton"``, or
            ``"library"`` (PyTorch's GEMMs around Triton kernels). The last two also take CPU tensors when the
            environment has TRITON_INTERPRET=1. For some operators only: ``"lca=triton,leff=reference"``. The
            environment variable CEIT_KERNELS_BACKEND sets the default likewise.

    Raises:
        ValueError, TypeError: unknown backend or operator.
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


@constant_result
def _old_gpu(device_index: int | None) -> str | None:
    chip = compute_capability(device_index)
    return None if chip >= 80 else f"the GPU has compute capability {chip / 10}, the kernels need 8.0"


@constant_result
def _unproven_gpu(device_index: int | None) -> str | None:
    """Why Triton runs on a GPU only where it is asked for."""
    if torch.version.hip is None or is_recording():
        return None
    chip = torch.cuda.get_device_properties(device_index).gcnArchName.partition(":")[0]
    proven = " and ".join(PROVEN_AMD_CHIPS)
    return None if chip in PROVEN_AMD_CHIPS else f"the kernels are proven for AMD's {proven}, and the GPU is {chip}"


def _refusal(
    operator: str, backend: str, device: str, index: int | None, dtype: torch.dtype, unsupported: str | None
) -> str | None:
    """Why a backend cannot serve a call, or None if it can."""
    if backend == "reference":
        return None
    code = OPERATORS[operator].implementations.get(backend)
    if code is None:
        return f"{operator} has no {backend} implementation"
    if unsupported is not None:
        return unsupported
    if backend in _BY_TRITON and not _HAS_TRITON:
        return "triton is not installed"
    interpreted = backend in _BY_TRITON and device == "cpu" and _INTERPRETING
    device = "cuda" if interpreted else device
    implementation = code.get(device, next(iter(code.values())))
    if dtype not in implementation.dtypes:
        *names, last = (str(name).removeprefix("torch.") for name in implementation.dtypes)
        return f"the kernels compute in {', '.join(names)} and {last}, not in {dtype}"
    if device not in code:
        needed = " or ".join(_DEVICE_NAMES[name] for name in code)
        debug = " (or TRITON_INTERPRET=1 before import, to debug)" if backend in _BY_TRITON else ""
        return f"the tensor is on the {device.upper()}, {operator}'s {backend} kernels need {needed}{debug}"
    if interpreted:
        return "Triton's interpreter computes wrongly in bfloat16" if dtype == torch.bfloat16 else None
    if implementation.compiled is not None and not has_kernel(implementation.compiled, device):
        return extension_problem(device)
    return _old_gpu(index) if device == "cuda" else None


def _decide(operator: str, device: str, index: int | None, dtype: torch.dtype, unsupported: str | None) -> Choice:
    wanted = _setting[operator]
    if wanted != "auto":
        refusal = _refusal(operator, wanted, device, index, dtype, unsupported)
        if refusal is not None:
            leave_to_reference(operator, refusal)
        return Choice(wanted, "asked for")
    refusals = []
    for backend, code in OPERATORS[operator].implementations.items():
        if backend == "library":
            continue  # operators that have it choose between it and Triton themselves
        if device == "cpu" and "cpu" not in code:
            refusals.append(f"{backend}: the tensor is on the CPU")
            continue
        refusal = _refusal(operator, backend, device, index, dtype, unsupported)
        if refusal is None and backend in _BY_TRITON and device == "cuda":
            refusal = _unproven_gpu(index)
        if refusal is None:
            return Choice(backend, "the fastest that can run")
        refusals.append(f"{backend}: {refusal}")
    return Choice("reference", "; ".join(refusals) or f"{operator} has no other implementation yet")


def choose(operator: str, x: Tensor, dtype: torch.dtype, unsupported: str | None = None) -> Choice:
    """The backend for a call of an operator.

    Args:
        operator: one of ``OPERATORS``.
        x: a tensor of the call, for its device.
        dtype: what the call computes in, which is not the dtype of ``x`` under autocast.
        unsupported: why only the reference can serve the call, if so.

    Raises:
        BackendError: the backend that was asked for cannot serve the call.
    """
    if torch.compiler.is_compiling():
        return _decide(operator, *target_device(x), dtype, unsupported)
    call = operator, *target_device(x), dtype, unsupported
    choice = _chosen.get(call)
    if choice is None:
        choice = _chosen[call] = _decide(*call)
    return choice


def leave_to_reference(operator: str, reason: str) -> None:
    """Raise ``BackendError`` where another backend was asked for than the reference, which ``reason`` leaves a call to.

    As ``choose`` with that reason, for a call of which nothing else is known.
    """
    wanted = _setting[operator]
    if wanted not in ("auto", "reference"):
        raise BackendError(f"{operator}: backend {wanted!r} was asked for but cannot run: {reason}")


def refusals(operator: str, x: Tensor, dtype: torch.dtype) -> dict[str, str]:
    """Why each backend that cannot serve a call of an operator cannot; arguments as those of ``choose``."""
    found = {
        backend: _refusal(operator, backend, *target_device(x), dtype, None)
        for backend in OPERATORS[operator].implementations
    }
    return {backend: reason for backend, reason in found.items() if reason is not None}


def require(operator: str, backend: str, x: Tensor, dtype: torch.dtype, unsupported: str | None = None) -> None:
    """Raise ``BackendError`` unless the registered operator can serve a call by ``backend``."""
    refusal = "it is plain PyTorch, call the function in ceit_kernels instead" if backend == "reference" else None
    refusal = refusal or _refusal(operator, backend, *target_device(x), dtype, unsupported)
    if refusal is not None:
        raise BackendError(f"ceit::{operator}: backend {backend!r} cannot run: {refusal}")


def compiled_operator(operator: str, x: Tensor) -> str | None:
    """The operator of the extension behind the native implementation on the device of a tensor, if there is one."""
    implementation = OPERATORS[operator].implementations["native"].get(target_device(x)[0])
    return None if implementation is None else implementation.compiled


@dataclass(frozen=True)
class OperatorStatus:
    """What would run an operator on one kind of device; ``backend`` is None where nothing would."""

    operator: str
    device: str
    backend: str | None
    reason: str


class Status(list[OperatorStatus]):
    """Rows of ``OperatorStatus``; its text is a table, what was measured of calls, and a line on the extension."""

    measured: Sequence[str] = ()
    extension: str = ""

    def __str__(self) -> str:
        rows = [("operator", "device", "backend", "why")]
        rows += [(row.operator, row.device, row.backend or "none", row.reason) for row in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:3]
        lines = ["  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows]
        return "\n".join([*lines, *self.measured, self.extension])


def status(dtype: torch.dtype = torch.float32) -> Status:
    """What would run each operator on this machine for inputs of ``dtype``, and why; a row for each device."""
    table = Status(_operator_status(operator, device, dtype) for operator in OPERATORS for device in _DEVICE_NAMES)
    table.measured, table.extension = describe_findings(), describe_extension()
    return table


def _operator_status(operator: str, device: str, dtype: torch.dtype) -> OperatorStatus:
    if device == "cuda" and not torch.cuda.is_available():
        return OperatorStatus(operator, device, None, "no CUDA GPU is available to PyTorch")
    try:
        choice = _decide(operator, device, None, dtype, None)
    except BackendError as error:
        return OperatorStatus(operator, device, None, str(error))
    return OperatorStatus(operator, device, *choice)


def fast_operators() -> set[str]:
    """The operators that something faster than plain PyTorch can run here, as ``status`` has it."""
    return {row.operator for row in status() if row.backend not in (None, "reference")}
