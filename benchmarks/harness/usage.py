"""What a call takes: memory, launches, bytes that it cannot avoid, and on a GPU the time of every kernel."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..traffic import Call

_ROUNDS = 5


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that PyTorch allocates during a call at its peak, beyond what was there before; None where it cannot tell.

    On the CPU the allocations are summed from a profile. What a library allocates by itself is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    del kept
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    present = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        present += event.nbytes()
        peak = max(peak, present)
    return peak


def count_launches(call: Callable[[], Any], device: torch.device) -> int | None:
    """Kernels that a call launches on a GPU, copies and fills included; None on the CPU, which launches none."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    events = profiler.profiler.kineto_results.events()
    return sum(event.device_type() == DeviceType.CUDA for event in events)


def compulsory_bytes(module: nn.Module, x: Tensor, out: Tensor, *, training: bool) -> int:
    """Bytes that no implementation avoids: input, output and parameters once; in training their gradients as well."""
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    tokens = x.numel() * x.element_size() + out.numel() * out.element_size()
    return (2 if training else 1) * (parameters + tokens)


@dataclass(frozen=True)
class KernelTime:
    """All launches of a kernel in a call.

    Attributes:
        name: the Triton kernel's, or that of a compiled operator with all kernels that it launches.
        launches: in a call.
        bytes: device memory that they read and write, as counted.
        flops: of their matmuls and convolutions, as counted.
        seconds: on the GPU, one launch added to the other.
    """

    name: str
    launches: int
    bytes: int
    flops: int
    seconds: float


def profile_kernels(call: Callable[[], Any], device: torch.device) -> list[tuple[str, float]]:
    """Name and seconds of every kernel that a call runs on a GPU, and of every operator of this project.

    An operator's time is that of the kernels that it launches, which are in the list themselves as well.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    found = []
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            found.append((event.name, event.time_range.elapsed_us() / 1e6))
        elif event.name.startswith("ceit::"):
            found.append((event.name.replace("::", "."), event.device_time_total / 1e6))
    return found


def kernel_times(call: Callable[[], Any], device: torch.device, counted: Call) -> tuple[list[KernelTime], list[str]]:
    """Measure the fused kernels of a call.

    Args:
        call: runs the call; its caches are warm.
        device: the GPU.
        counted: the call, as `benchmarks.traffic.count_workload` counts it.

    Returns:
        A `KernelTime` for each name, the least of a few calls; and a line for each kernel that was not launched as
        often as it was counted, for which there is none.
    """
    fused = [kernel for kernel in counted.kernels if kernel.fused]
    expected = Counter(kernel.name for kernel in fused)
    rounds = []
    for _ in range(_ROUNDS):
        times: dict[str, list[float]] = defaultdict(list)
        for name, seconds in profile_kernels(call, device):
            times[name].append(seconds)
        rounds.append(times)
    found, missing = [], []
    for name, launches in expected.items():
        launched = sorted({len(times[name]) for times in rounds})
        if launched != [launches]:
            missing.append(f"{name}: counted {launches} times, launched {' or '.join(map(str, launched))} times")
            continue
        own = [kernel for kernel in fused if kernel.name == name]
        amounts = sum(kernel.bytes for kernel in own), sum(kernel.flops for kernel in own)
        found.append(KernelTime(name, launches, *amounts, min(sum(times[name]) for times in rounds)))
    return found, missing
