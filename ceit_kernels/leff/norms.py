"""The BatchNorms of LeFF: what they compute with, and how they keep their running statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .. import backends
from ..common.calls import is_eager
from ..common.children import held
from ..common.launch import is_recording
from ..common.running import tell_counters, uncounted
from ..common.sync_norm import process_group_of_norm
from .activations import ACTIVATIONS

__all__ = [
    "BatchNorm",
    "buffers_for_one_launch",
    "folded",
    "momenta_of",
    "norm_mode",
    "of_module",
    "plain_norm",
    "process_group_of",
    "update_running_statistics",
]


class BatchNorm(NamedTuple):
    """A BatchNorm's tensors and settings, with the names and defaults of ``torch.nn.functional.batch_norm``.

    Attributes:
        running_mean: mean of each channel; updated in place where ``training``, not kept if None.
        running_var: variance of each channel, likewise.
        weight: factor of each channel; 1 if None.
        bias: what is added to each channel; 0 if None.
        training: take mean and variance of this batch, not the running ones.
        momentum: weight of this batch in the running statistics; None for their average over all batches.
        eps: added to the variance.
        num_batches_tracked: int64 (), counts the batches where ``training``; needed where ``momentum`` is None.
        process_group: the processes whose batches are one where ``training``, as for ``torch.nn.SyncBatchNorm``; only
            this one if None.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float | None = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None
    process_group: torch.distributed.ProcessGroup | None = None


def norm_mode(norm: BatchNorm | None) -> str:
    """What the operators call it: "none", "frozen" or "batch"."""
    if norm is None:
        return "none"
    return "batch" if norm.training else "frozen"


def of_module(module: nn.Module) -> BatchNorm | None:
    """What a BatchNorm2d, alone or over processes, does in its present mode; None for an Identity."""
    if isinstance(module, nn.Identity):
        return None
    tracks = not module.training or module.track_running_stats
    mean, variance = (held(module, "running_mean"), held(module, "running_var")) if tracks else (None, None)
    return BatchNorm(
        mean,
        variance,
        held(module, "weight"),
        held(module, "bias"),
        module.training or mean is None,
        module.momentum,
        module.eps,
        held(module, "num_batches_tracked") if module.training and tracks else None,
        process_group_of_norm(module),
    )


def plain_norm(name: str, norm: BatchNorm | None) -> Callable[[Tensor], Tensor]:
    """A norm by plain PyTorch, named in errors. A batch is counted now, and averaged when it is called."""
    if norm is None:
        return ACTIVATIONS["identity"]
    if norm.process_group is not None:
        raise backends.BackendError(
            f"{name}: plain PyTorch takes statistics over processes only as torch.nn.SyncBatchNorm, whose module "
            "FusedLeFF takes"
        )
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        momentum = 1.0 / float(norm.num_batches_tracked) if momentum is None else momentum
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return lambda z: F.batch_norm(z, *tensors, norm.training, momentum or 0.0, norm.eps)


@torch.no_grad()
def folded(convolution: nn.Conv2d, norm: BatchNorm) -> nn.Conv2d:
    """A copy of a convolution that computes what it and the norm behind it do, which has running statistics."""
    convolution = copy.deepcopy(convolution)
    dtype = convolution.weight.dtype
    acc_dtype = torch.promote_types(dtype, torch.float32)
    tensors = (convolution.weight, convolution.bias, *norm[:4])
    exact: list[Any] = [None if tensor is None else tensor.to(acc_dtype) for tensor in tensors]
    weight, bias, mean, var, *affine = exact
    both = fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, *affine)
    for name, tensor in zip(("weight", "bias"), both, strict=True):
        convolution._parameters.pop(name, None)
        convolution.register_buffer(name, tensor.detach().to(dtype))
    return convolution


def process_group_of(norms: Sequence[BatchNorm | None]) -> tuple[str | None, str | None]:
    """The name of the group that the batch statistics are taken over, and why the kernels cannot, if they cannot."""
    groups = [norm.process_group for norm in norms if norm and norm.training]
    names = {None if group is None else group.group_name for group in groups}
    if len(names) > 1:
        return None, "the kernels take the statistics of all three norms over the same processes"
    return (names.pop() if names else None), None


@torch.no_grad()
def update_running_statistics(
    norms: Sequence[BatchNorm | None], statistics: Sequence[Tensor], count: Tensor, tokens: int, backend: str = ""
) -> None:
    """Average this batch into the running statistics, as ``torch.nn.BatchNorm2d`` does.

    Args:
        norms: of the three layers.
        statistics: of each layer mean and variance of this batch in rows 0 and 1; not read for other layers than those
            in training.
        count: (1,), of how many tokens they were taken, in all processes.
        tokens: of how many in this process; nothing is averaged if 0.
        backend: of the call; Triton takes one launch, unless compilers are to see the operators.
    """
    if backend in ("triton", "library") and tokens > 0 and (is_recording() or is_eager(count)):
        buffers = buffers_for_one_launch(norms, count.device)
        if buffers is not None:
            from .triton.launch_running import update_running_statistics_triton

            update_running_statistics_triton(count, *statistics, *buffers, *momenta_of(norms))
            tell_counters(buffers[2::3])
            return
    tracked = [(n, s) for n, s in zip(norms, statistics, strict=True) if n is not None and n.training]
    counters = [n.num_batches_tracked for n, _ in tracked if n.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    tracked = [(n, s) for n, s in tracked if n.running_mean is not None]
    if not tracked or tokens == 0:
        return
    # The variance of a population, from that of this sample of it.
    alone = all(n.process_group is None for n, _ in tracked)
    factor = tokens / (tokens - 1) if alone else (count / (count - 1))[0]
    variances = torch._foreach_mul([s[1] for _, s in tracked], factor)
    updates: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for (norm, rows), variance in zip(tracked, variances, strict=True):
        pairs = [(uncounted(kept), new) for kept, new in ((norm.running_mean, rows[0]), (norm.running_var, variance))]
        if norm.momentum is None:
            if norm.num_batches_tracked is not None:
                # On the device: reading the counter would wait for it.
                share = 1.0 / norm.num_batches_tracked
                for running, new in pairs:
                    running.lerp_(new.to(running.dtype), share.to(running.dtype))
            continue
        buffers, values = updates.setdefault(norm.momentum, ([], []))
        for running, new in pairs:
            buffers.append(running)
            values.append(new.to(running.dtype))
    for momentum, (buffers, values) in updates.items():
        torch._foreach_lerp_(buffers, values, momentum)


def buffers_for_one_launch(norms: Sequence[BatchNorm | None], device: torch.device) -> list[Tensor | None] | None:
    """Of each layer in training the running mean and variance and the counter, of others None.

    None in all if kernels cannot write them: averages over all batches, no running statistics, strided ones, or one
    norm in two layers.
    """
    buffers: list[Tensor | None] = []
    for norm in norms:
        if norm is None or not norm.training:
            buffers += (None, None, None)
        elif norm.momentum is None or norm.running_mean is None or norm.running_var is None:
            return None
        else:
            buffers += (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    written = [b for b in buffers if b is not None]
    unlike = [b for b in written if not b.is_contiguous() or b.device != device]
    places = set(map(id if is_recording() else Tensor.data_ptr, written))
    return buffers if written and not unlike and len(places) == len(written) else None


def momenta_of(norms: Sequence[BatchNorm | None]) -> tuple[float, ...]:
    """The momentum of each norm, 0 where there is none."""
    return tuple([0.0 if norm is None else float(norm.momentum or 0.0) for norm in norms])
