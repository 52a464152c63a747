"""Measuring a workload: implementations are built, checked against the plain module, and timed in turns."""

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ceit.runtime.machine import fused_operators

from ..traffic import SavedTensors, count_workload
from ..workloads import Workload
from .checking import check_outputs
from .implementations import COSTLY, FLOOR, IMPLEMENTATIONS, OURS, Step, absence, build, first_line
from .statistics import Ratio, median_ratio
from .timing import CudaTimer, Sampler, interleave, make_timer
from .usage import compulsory_bytes, count_launches, kernel_times, peak_memory

_MAX_INPUTS = 64


class Clock:
    """What a run may spend, and what it has spent.

    Args:
        seconds: of the whole run.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds, self._start = seconds, time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def used(self, share: float) -> bool:
        """Whether a share of the limit is spent."""
        return self.spent > share * self.seconds


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
        host_seconds: on a GPU, of a call without a graph, until Python has launched everything.
        wall_seconds: on a GPU, of a call without a graph, until the GPU is done.
        kernels: on a GPU, fields of a `KernelTime` for every kernel of the fused operators.
        unmatched: kernels that were not launched as often as they were counted, in words.
    """

    implementation: str
    status: str
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    ratio: Ratio | None = None
    method: str = ""
    backends: dict[str, dict[str, str]] = field(default_factory=dict)
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    launches: int | None = None
    host_seconds: float | None = None
    wall_seconds: float | None = None
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
        workload: what they compute.
        entries: one for each implementation.
        flops: of the plain module's matmuls and convolutions in a call.
        compulsory_bytes: see `usage.compulsory_bytes`.
        rotating_inputs: inputs that the calls went through.
    """

    workload: Workload
    entries: list[Entry]
    flops: int = 0
    compulsory_bytes: int = 0
    rotating_inputs: int = 0

    def __getitem__(self, implementation: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.implementation == implementation), None)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Result":
        """The result of `dataclasses.asdict`."""
        entries = [Entry(**{**e, "ratio": Ratio(**e["ratio"]) if e["ratio"] else None}) for e in stored["entries"]]
        return cls(**{**stored, "workload": Workload(**stored["workload"]), "entries": entries})


def result_rows(result: Result) -> list[list[str]]:
    """The implementations of a workload: time, ratio with its interval, rates, memory, backends or the reason."""
    # On a GPU: without a graph, and the host's part of it.
    eager = ["eager ms", "host ms"] if any(entry.wall_seconds for entry in result.entries) else []
    head = ["ms", "plain / this", "99% interval", *eager, "GB/s", "TFLOP/s", "peak MB", "saved MB"]
    rows = [["implementation", *head, "note"]]
    for entry in result.entries:
        if entry.median is None:
            rows.append([entry.implementation, *["-"] * len(head), f"{entry.status}: {entry.reason}"])
            continue
        rates = result.compulsory_bytes / entry.median / 1e9, result.flops / entry.median / 1e12
        memory = ("-" if size is None else f"{size / 1e6:,.1f}" for size in (entry.peak_bytes, entry.saved_bytes))
        backends = ", ".join(f"{operator} by {by['backend']}" for operator, by in entry.backends.items())
        time = [f"{1e3 * entry.median:,.2f}", *entry.ratio.cells()]
        if eager:
            time += [f"{1e3 * seconds:,.2f}" for seconds in (entry.wall_seconds, entry.host_seconds)]
        rows.append([entry.implementation, *time, f"{rates[0]:,.1f}", f"{rates[1]:,.3f}", *memory, backends])
    return rows


def measure_workload(
    workload: Workload,
    device: torch.device,
    *,
    seconds: float = 4.0,
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS),
    clock: Clock | None = None,
) -> Result:
    """Build, check and time the implementations of a workload.

    The reference is the plain module in the same dtype. Nothing that fails, is refused or is absent leaves the result;
    where plain fails, all do.

    Args:
        workload: what is computed.
        device: where.
        seconds: to spend on timing, all implementations together.
        implementations: who takes part; the plain module always does.
        clock: what the run may spend. Where it has a limit, what takes minutes to compile is left out, and when 70% is
            used every costly compilation.
    """
    names = list(dict.fromkeys(("plain", *implementations)))
    if device.type == "cuda":
        # What the workload before left, cyclic references included, is room that this one may need.
        gc.collect()
        torch.cuda.empty_cache()
    try:
        return _measure(workload, device, seconds, names, clock or Clock())
    except RuntimeError as error:
        return Result(workload, [Entry(name, "failed", f"plain failed: {first_line(error)}") for name in names])


def _measure(workload: Workload, device: torch.device, seconds: float, names: Sequence[str], clock: Clock) -> Result:
    module = workload.make_module().to(device, workload.torch_dtype)
    inputs = workload.make_inputs(_num_inputs(workload, device), device)
    x = inputs[0]
    plain = build("plain", workload, module, x)
    expected = plain.run(x).clone()
    gradients = {name: grad.clone() for name, grad in plain.gradients(x).items()}
    timer, dtype = make_timer(device), workload.dtype
    entries = {name: Entry(name, "timed") for name in names}
    steps: dict[str, Step] = {}
    samplers: dict[str, Sampler] = {}
    for name, entry in entries.items():
        entry.reason = absence(name, workload, device) or _postponement(name, workload, clock) or ""
        if entry.reason:
            entry.status = "absent"
            continue
        try:
            step = build(name, workload, module, x)
            out = step.run(x)
            entry.reason = "" if name == FLOOR else check_outputs(out, expected, step.gradients(x), gradients, dtype)
            if entry.reason:
                entry.status = "refused"
                continue
            options = {"capture": False} if step.has_graphs else {}
            samplers[name] = timer.prepare(partial(_run, step, inputs), len(inputs), step.spinning, **options)
        except RuntimeError as error:
            if name == "plain":
                raise
            entry.status, entry.reason = "failed", first_line(error)
            continue
        steps[name] = step
    for name, times in interleave(samplers, seconds).items():
        entries[name].seconds, entries[name].method = times, samplers[name].method
    for name, step in steps.items():
        if isinstance(timer, CudaTimer):
            eager = timer.eager(partial(_run, step, inputs), len(inputs))
            entries[name].host_seconds, entries[name].wall_seconds = eager
        entries[name].ratio = median_ratio(entries["plain"].seconds, entries[name].seconds)
        _add_usage(entries[name], step, x, workload, device)
    flops = sum(kernel.flops for kernel in count_workload(workload, "plain").kernels)
    moved = compulsory_bytes(module, x, expected, training=workload.training)
    return Result(workload, list(entries.values()), flops, moved, len(inputs))


def _run(step: Step, inputs: Sequence[Tensor], i: int) -> Tensor:
    return step.run(inputs[i])


def _postponement(implementation: str, workload: Workload, clock: Clock) -> str | None:
    """Why an implementation waits for a run without a limit, None if it does not."""
    if implementation not in COSTLY or clock.seconds == math.inf:
        return None
    takes_minutes = workload.is_model and (implementation == "compile-max-autotune" or workload.batch > 1)
    short = takes_minutes or clock.used(0.7)
    return f"the run's time is short; python -m benchmarks --only {workload.name} times it" if short else None


def _add_usage(entry: Entry, step: Step, x: Tensor, workload: Workload, device: torch.device) -> None:
    if step.module is None:
        return

    def call() -> Tensor:
        return step.run(x)

    if entry.implementation in OURS:
        entry.backends = fused_operators(step.module, device, workload.torch_dtype)
    # The gradients that a step leaves are part of what it takes, so none may be there before.
    step.forget_gradients(x)
    entry.peak_bytes = peak_memory(call, device)
    entry.launches = count_launches(call, device)
    if entry.implementation == "fused" and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        times, entry.unmatched = kernel_times(call, device, count_workload(workload, "fused", 10 * major + minor))
        entry.kernels = [asdict(time) for time in times]
    if workload.training:
        with SavedTensors(step.module) as saved:
            call()
        entry.saved_bytes = saved.bytes()


def _num_inputs(workload: Workload, device: torch.device) -> int:
    """Inputs that together exceed twice a GPU's L2 cache; on the CPU one, which is what serving has."""
    if device.type != "cuda":
        return 1
    size = torch.Size(workload.shape).numel() * workload.torch_dtype.itemsize
    return min(_MAX_INPUTS, max(2, -(-2 * torch.cuda.get_device_properties(device).L2_cache_size // size)))
