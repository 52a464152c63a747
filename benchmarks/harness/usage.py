"""What a call takes beside time: peak memory, launches, tensors saved for backward, bytes that it cannot avoid."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


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
    return sum(event.device_type() == torch.autograd.DeviceType.CUDA for event in events)


def saved_bytes(call: Callable[[], Any], module: nn.Module) -> int:
    """Bytes that autograd keeps for backward, a storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


def compulsory_bytes(module: nn.Module, x: Tensor, out: Tensor, *, training: bool) -> int:
    """Bytes that no implementation avoids: input, output and parameters once; in training their gradients as well."""
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    tokens = x.numel() * x.element_size() + out.numel() * out.element_size()
    return (2 if training else 1) * (parameters + tokens)
