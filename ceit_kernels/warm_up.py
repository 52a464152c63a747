"""Compiling a model's kernels ahead of its first step."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .backends import BackendError, current_backend, use_backend
from .common.arguments import names_its_arguments
from .common.compile_ahead import compile_launches
from .common.launch import Launch, compute_capability, record_launches
from .common.sync_norm import SyncBatchNorm2d

__all__ = ["warm_up"]

_log = logging.getLogger("ceit_kernels")


@names_its_arguments
def warm_up(
    model: nn.Module,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    training: bool = True,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compile the Triton kernels of a model's steps, several at a time, which its first step would do one by one.

    Nothing is computed and no memory of the GPU is taken: a copy of the model without data records what it would
    launch, with hooks taken away. Kernels do not depend on the number of images. What is compiled stays in Triton's
    cache; processes that share it compile one after another, so that the others find it there. On a CPU there is
    nothing to do, and where norms span processes nothing is done.

    Args:
        model: on a GPU, fused. Inside ``torch.autocast`` what its steps compute under it counts.
        shape: of its input, (B, 3, H, W) for images.
        dtype: of its input.
        training: a step with gradients, in training mode; or a call for inference in evaluation mode.
        threads: how many are compiled at a time, unless given one for each core.
        progress: is told how many are done, and of how many.

    Returns:
        The number of kernels that were compiled or found in the cache; the logger "ceit_kernels" tells it too.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    if device is None or device.type != "cuda":
        return 0
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and any(isinstance(module, (nn.SyncBatchNorm, SyncBatchNorm2d)) for module in model.modules()):
        return 0  # a record would wait for the statistics of other processes
    with torch.cuda.device(device):
        chip = compute_capability(device.index)
        launches = launches_of(model, shape, dtype, training, chip)
        if current_backend("leff") == "auto":  # the first call measures both
            for pipeline in ("leff=triton", "leff=library"):
                with suppress(BackendError), use_backend(pipeline):
                    launches += launches_of(model, shape, dtype, training, chip)
        count = compile_launches(launches, threads or _cores(), progress or _silent)
    _log.info("%d kernels of %s are compiled", count, type(model).__name__)
    return count


def launches_of(model: nn.Module, shape: Sequence[int], dtype: torch.dtype, training: bool, chip: int) -> list[Launch]:
    """What a step of a model launches by Triton, on a GPU that need not be there; ``chip`` is that of the record."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        tensors = [t for module in model.modules() for t in (*vars(module).values(), *_held(module))]
        twin = copy.deepcopy(model, {id(t): _without_data(t) for t in tensors if isinstance(t, Tensor)}).train(training)
    for module in twin.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            module.__dict__[name].clear()
    autocast = next((kind for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind)), None)
    cast = torch.autocast("cpu", torch.get_autocast_dtype(autocast)) if autocast else nullcontext()
    with mode, record_launches(chip, eager=True) as launches, _Launching(), torch.set_grad_enabled(training), cast:
        results = twin(torch.empty(tuple(shape), dtype=dtype))
        sums = [x.float().sum() for x in tree_leaves(results) if isinstance(x, Tensor) and x.requires_grad]
        if sums:
            torch.stack(sums).sum().backward()
    return launches


def _held(module: nn.Module) -> list[Tensor | None]:
    return [*module._parameters.values(), *module._buffers.values()]


def _without_data(tensor: Tensor) -> Tensor:
    """A fake tensor on the CPU, where autograd needs no GPU."""
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


class _Launching(TorchDispatchMode):
    """Lets this package's operators launch for tensors without data, in whose place PyTorch would only make results."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = DispatchKey.CompositeExplicitAutograd
        if func.namespace == "ceit" and func.has_kernel_for_dispatch_key(key):
            with self:
                return func._op_dk(key, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _silent(done: int, total: int) -> None:
    pass
