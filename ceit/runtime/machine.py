"""What a run runs on and by: versions, devices, memory, and the implementation behind every fused operator."""

import ctypes
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import timm
import torch
from torch import nn
from tqdm import tqdm

import ceit_kernels
from ceit_kernels.operators import OPERATORS

from .errors import UsageError, usage_errors
from .options import PredictOptions, RunOptions

_logger = logging.getLogger(__name__)

AMP_DTYPES = {"none": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide over the numbers."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "not installed"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "timm": timm.__version__,
        "ceit-kernels": ceit_kernels.__version__,
    }


def devices() -> list[str]:
    """The devices to run on, in words."""
    gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return [f"cpu {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads", *gpus]


def fused_operators(model: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, str]]:
    """What runs every fused operator of `model`, by operator: {"backend": ..., "reason": ...}; empty for a plain model.

    Args:
        model: a model, fused or not.
        device: where it runs.
        dtype: what it computes in.

    Raises:
        UsageError: the backend that was asked for cannot run one of them.
    """
    modules = list(model.modules())
    present = {name for name, spec in OPERATORS.items() if any(isinstance(m, spec.fused_classes()) for m in modules)}
    rows = [row for row in ceit_kernels.status(dtype) if row.operator in present and row.device == device.type]
    for row in rows:
        if row.backend is None:
            raise UsageError(row.reason)
    return {row.operator: {"backend": row.backend, "reason": row.reason} for row in rows}


def check_graphs(device: torch.device) -> None:
    """Raise `UsageError` where there are no CUDA graphs."""
    if device.type != "cuda":
        raise UsageError(f"--cuda-graphs needs a CUDA GPU, and the device is {device}")


def for_inference(model: nn.Module, operators: dict[str, dict[str, str]], cuda_graphs: bool) -> nn.Module:
    """A model as it is evaluated: a fused one frozen, a plain one as it is, either by CUDA graphs if wanted.

    Args:
        model: in evaluation mode, where it runs.
        operators: from `fused_operators`.
        cuda_graphs: whether to replay graphs.
    """
    if operators:
        return ceit_kernels.freeze(model, cuda_graphs=cuda_graphs)
    return ceit_kernels.graphed(model) if cuda_graphs else model


def compile_kernels(model: nn.Module, shape: tuple[int, ...], amp: str, visible: bool) -> None:
    """Compile what a model's steps will launch on a GPU, training and evaluation, and show how far it is.

    Args:
        model: where it runs.
        shape: of a batch.
        amp: type of mixed precision.
        visible: whether it is shown.
    """
    with tqdm(desc="compiling kernels", unit=" kernels", disable=not visible, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        for training in (True, False):
            try:
                with autocast(torch.device("cuda"), amp):
                    ceit_kernels.warm_up(model, shape, training=training, progress=show)
            except Exception as error:  # the steps will show whether anything is wrong
                _logger.warning("kernels are compiled at their first launch: %s", error)
            bar.reset()


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed, unless its variables say something of that; elsewhere nothing is done.

    By default it depends on what the process did before whether every step gets its memory from the system anew, page
    by page: a few percent of a training step on the CPU.
    """
    trim_threshold, mmap_threshold, never = -1, -3, 1 << 30
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        # Older versions take at most 32 MB.
        _ = mallopt(mmap_threshold, never) or mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, never)


def peak_memory_mb(device: torch.device) -> float | None:
    """Largest memory so far in MB (1e6 bytes): tensors on a GPU, or everything of this process on the CPU.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


@contextmanager
def backend(options: RunOptions | PredictOptions) -> Iterator[None]:
    """Run the fused operators by `options.backend` inside a `with` block; None leaves it to the environment."""
    name = options.backend
    with ExitStack() as stack:
        if name is not None:
            if options.fused is False:
                raise UsageError(f"--backend {name} is for fused operators, which --no-fused leaves out")
            with usage_errors("--backend"):
                stack.enter_context(ceit_kernels.use_backend(name))
        yield


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The context of mixed precision that the option `amp` names."""
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp], enabled=amp != "none")
