"""Measuring a workload: implementations are built, checked against the reference, and timed in turns."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ceit.runtime.machine import fused_operators
from ceit_kernels import fuse

from ..traffic import Call, Kernel, count_call
from .checking import check_outputs
from .implementations import COSTLY, FLOOR, IMPLEMENTATIONS, OURS, ImplementationError, Step, absence, build, first_line
from .kernels import kernel_times, with_stem_products
from .statistics import median_ratio
from .timing import Sampler, interleave, make_timer
from .usage import compulsory_bytes, count_launches, peak_memory, saved_bytes
from .workloads import Workload

__all__ = ["Clock", "Entry", "Result", "measure_workload"]

_MAX_INPUTS = 64


class Clock:
    """What a run may spend, and what it has spent.

    Args:
        seconds: of the whole run; None for no limit.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds, self._start = seconds, time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self._seconds is not None

    def used(self, share: float) -> bool:
        """Whether a share of the limit is spent."""
        return self._seconds is not None and self.spent > share * self._seconds


@dataclass
class Entry:
    """An implementation's result.

    Attributes:
        implementation: its name.
        status: "timed", "refused" (a wrong result), "failed" (it could not be built or run) or "absent".
        reason: why it was not timed.
        seconds: of a call, one for each round.
        ratio: plain's time / this one's with its interval: above 1 is faster than plain.
        method: how the calls were timed.
        backends: what ran each fused operator, and why: {operator: {"backend": ..., "reason": ...}}.
        peak_bytes: allocated during a call at its peak, parameters and input left out, gradients included.
        saved_bytes: kept for backward.
        launches: kernels on a GPU.
        kernels: on a GPU, fields of a `KernelTime` for every kernel of the fused operators.
        unmatched: kernels that were not launched as often as they were counted, in words.
    """

    implementation: str
    status: str
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    ratio: dict[str, float] | None = None
    method: str = ""
    backends: dict[str, dict[str, str]] = field(default_factory=dict)
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    launches: int | None = None
    kernels: list[dict[str, Any]] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        """Seconds of a call in the middle of the rounds."""
        return median(self.seconds) if self.seconds else None


@dataclass
class Result:
    """A workload's implementations and what is the same for all of them.

    Attributes:
        workload: fields of the `Workload`.
        name: the workload's.
        entries: one for each implementation.
        flops: of the plain module's products in a call.
        compulsory_bytes: see `usage.compulsory_bytes`.
        rotating_inputs: inputs that the calls went through.
    """

    workload: dict[str, Any]
    name: str
    entries: list[Entry]
    flops: int
    compulsory_bytes: int
    rotating_inputs: int

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON has it."""
        return asdict(self)


def measure_workload(
    workload: Workload,
    device: torch.device,
    *,
    seconds: float = 4.0,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    clock: Clock | None = None,
    details: bool = True,
) -> Result:
    """Build, check and time the implementations of a workload.

    The reference is the plain module in the same dtype. Nothing that fails, is refused or is absent leaves the result.

    Args:
        workload: what is computed.
        device: where.
        seconds: to spend on timing, all implementations together.
        implementations: who takes part; the plain module always does.
        clock: what the run may spend. Where it has a limit, what takes minutes to compile is left out, and when 70% is
            used every costly compilation.
        details: also measure memory, launches and saved bytes.
    """
    clock = clock or Clock()
    if device.type == "cuda":
        # What the workload before left, cyclic references included, is room that this one may need.
        gc.collect()
        torch.cuda.empty_cache()
    module = workload.make_module().to(device, workload.torch_dtype)
    inputs = workload.make_inputs(_num_inputs(workload, device), device)
    reference = build("plain", workload, module, inputs[0])
    expected = reference.run(inputs[0]).clone()
    gradients = {name: grad.clone() for name, grad in reference.gradients(inputs[0]).items()}
    entries, steps = [], {}
    for name in dict.fromkeys(("plain", *implementations)):
        reason = absence(name, workload, device)
        if reason is None and _postponed(name, workload, clock):
            reason = f"the run's time is short; python -m ceit bench --only {workload.name} times it"
        if reason is not None:
            entries.append(Entry(name, "absent", reason))
            continue
        entry, step = _build_checked(name, workload, module, inputs[0], expected, gradients)
        entries.append(entry)
        if step is not None:
            steps[name] = step
    samplers = _prepare(entries, steps, inputs, device)
    times = interleave(samplers, seconds)
    for entry in entries:
        if entry.implementation in samplers:
            entry.seconds, entry.method = times[entry.implementation], samplers[entry.implementation].method
            entry.ratio = median_ratio(times["plain"], entry.seconds).as_dict()
            if details:
                _add_usage(entry, steps[entry.implementation], inputs[0], workload, device)
    plain = _count(workload, workload.make_module)
    return Result(
        asdict(workload),
        workload.name,
        entries,
        sum(kernel.flops for kernel in plain.forward + plain.backward),
        compulsory_bytes(module, inputs[0], expected, training=workload.phase == "training"),
        len(inputs),
    )


def _prepare(
    entries: Sequence[Entry], steps: dict[str, Step], inputs: Sequence[Tensor], device: torch.device
) -> dict[str, Sampler]:
    """Samplers of the implementations by name; one that fails now, most likely for want of memory, is marked so."""
    timer, samplers = make_timer(device), {}
    for entry in entries:
        if entry.status != "timed":
            continue
        try:
            step = steps[entry.implementation]
            samplers[entry.implementation] = timer.prepare(_call(step, inputs), len(inputs), step.spinning)
        except RuntimeError as error:
            if entry.implementation == "plain":
                raise ImplementationError(first_line(error)) from error
            entry.status, entry.reason = "failed", first_line(error)
    return samplers


def _count(workload: Workload, make: Callable[[], nn.Module], chip: int = 90) -> Call:
    return count_call(
        make,
        workload.shape,
        workload.torch_dtype,
        training=workload.phase == "training",
        input_gradient=workload.input_gradient,
        chip=chip,
    )


def _fused_kernels(workload: Workload, device: torch.device) -> list[Kernel]:
    """The kernels of the fused module's call on a GPU, as counted."""
    major, minor = torch.cuda.get_device_capability(device)
    call = _count(workload, lambda: fuse(workload.make_module()), 10 * major + minor)
    if workload.operator in ("i2t", "model"):
        stem = replace(workload, operator="i2t")
        call = with_stem_products(call, _count(stem, stem.make_module))
    return call.forward + call.backward


def _postponed(implementation: str, workload: Workload, clock: Clock) -> bool:
    if implementation not in COSTLY or not clock.limited:
        return False
    takes_minutes = workload.operator == "model" and (implementation == "compile-max-autotune" or workload.batch > 1)
    return takes_minutes or clock.used(0.7)


def _build_checked(
    name: str, workload: Workload, module: nn.Module, x: Tensor, expected: Tensor, gradients: dict[str, Tensor]
) -> tuple[Entry, Step | None]:
    try:
        step = build(name, workload, module, x)
        out = step.run(x)
    except ImplementationError as error:
        return Entry(name, "failed", str(error)), None
    wrong = None
    if name != FLOOR:
        wrong = check_outputs(out, expected, step.gradients(x) if gradients else {}, gradients, workload.dtype)
    if wrong is not None:
        return Entry(name, "refused", wrong), None
    entry = Entry(name, "timed")
    if name in OURS:
        entry.backends = fused_operators(step.module, x.device, workload.torch_dtype)
    return entry, step


def _call(step: Step, inputs: Sequence[Tensor]) -> Callable[[int], Tensor]:
    return lambda i: step.run(inputs[i])


def _add_usage(entry: Entry, step: Step, x: Tensor, workload: Workload, device: torch.device) -> None:
    if step.module is None:
        return
    # The gradients that a step leaves are part of what it takes, so none may be there before.
    step.forget_gradients(x)
    entry.peak_bytes = peak_memory(lambda: step.run(x), device)
    entry.launches = count_launches(lambda: step.run(x), device)
    if entry.implementation == "fused" and device.type == "cuda":
        times, entry.unmatched = kernel_times(lambda: step.run(x), device, _fused_kernels(workload, device))
        entry.kernels = [asdict(time) for time in times]
    if workload.phase == "training":
        entry.saved_bytes = saved_bytes(lambda: step.run(x), step.module)


def _num_inputs(workload: Workload, device: torch.device) -> int:
    """Inputs that together exceed twice a GPU's L2 cache; on the CPU one, which is what serving has."""
    if device.type != "cuda":
        return 1
    size = torch.Size(workload.shape).numel() * workload.torch_dtype.itemsize
    return min(_MAX_INPUTS, max(2, -(-2 * torch.cuda.get_device_properties(device).L2_cache_size // size)))
