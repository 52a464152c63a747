"""The stem as a function of its tensors and its BatchNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends
from ..common.autocast import autocast_dtype
from ..common.calls import is_eager, needs_gradient
from ..common.checks import norm_dtype_reason
from ..common.launch import is_recording
from ..common.running import tell_counters, uncounted
from ..common.sync_norm import process_group_of_norm, sum_over_processes
from .arguments import Running
from .op import group_unsupported_reason, i2t_operator, on_cpu, size_unsupported_reason

__all__ = ["image_to_tokens"]

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm


def image_to_tokens(x: Tensor, weight: Tensor, bn: BatchNorm) -> Tensor | None:
    """Convolution of stride 2, BatchNorm, 3x3 maximum pool of stride 2; None where that is left to plain PyTorch.

    Args:
        x: (B, I, H, W), checked, contiguous or channels-last.
        weight: (O, I, 7, 7).
        bn: over O channels; its running statistics are updated in training.

    Returns:
        (B, O, H', W') in channels-last memory.

    Raises:
        ValueError: a channel has a single value to take statistics of.
        BackendError: the backend that was asked for cannot serve the call.
    """
    tensors = x, weight, bn.weight, bn.bias
    compute_dtype = autocast_dtype(x)
    dtype = compute_dtype or x.dtype
    processes = process_group_of_norm(bn)
    group = None if processes is None else processes.group_name
    unsupported = (
        size_unsupported_reason(x, weight.shape[0])
        or group_unsupported_reason(x, group)
        or norm_dtype_reason("bn", dtype, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    )
    backend = backends.choose("i2t", x, dtype, unsupported).backend
    if backend == "reference":
        return None
    values_per_channel = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
    if bn.training and values_per_channel == 1 and group is None:
        raise ValueError(f"x: expected more than one value per channel in training, got {tuple(x.shape)}")
    batch_statistics = bn.training or bn.running_mean is None
    statistics = (None, None) if batch_statistics else (bn.running_mean, bn.running_var)
    settings = bn.eps, needs_gradient(*tensors), compute_dtype, group, backend
    tracked = bn.training and bn.track_running_stats and bn.running_mean is not None
    running = _for_one_launch(bn, x, values_per_channel) if tracked else None
    if running is not None and is_eager(x):
        out, *_ = i2t_operator.eager(*tensors, *statistics, *settings, running)
        tell_counters((running.batches,))
        return out
    out, _, mean, variance, _ = i2t_operator(*tensors, *statistics, *settings)
    # Recorded is what an eager call launches.
    if tracked and (running is None or not is_recording()):
        values = values_per_channel if group is None else _total(values_per_channel, mean, group)
        _update_running_statistics(bn, mean, variance, values)
    return out


def _for_one_launch(bn: BatchNorm, x: Tensor, values: int) -> Running | None:
    """What the kernels of a GPU average of so many values in a channel; None where they cannot."""
    mean, variance, batches = buffers = bn.running_mean, bn.running_var, bn.num_batches_tracked
    if on_cpu(x) or bn.momentum is None or mean is None or variance is None:
        return None
    if any(b is not None and (not b.is_contiguous() or b.device != x.device) for b in buffers):
        return None
    if batches is not None and batches.dtype != torch.int64:
        return None
    return Running(*buffers, bn.momentum, values / (values - 1))


def _total(values: int, like: Tensor, group: str) -> Tensor:
    return sum_over_processes(like.new_tensor([values])[None], group)[0]


@torch.no_grad()
def _update_running_statistics(bn: BatchNorm, mean: Tensor, variance: Tensor, n: int | Tensor) -> None:
    """As ``BatchNorm2d`` does it: the unbiased variance, and a plain average where momentum is None."""
    assert bn.num_batches_tracked is not None
    assert bn.running_mean is not None
    assert bn.running_var is not None
    bn.num_batches_tracked.add_(1)
    momentum = 1.0 / bn.num_batches_tracked.to(mean.dtype) if bn.momentum is None else bn.momentum
    for kept, new in ((bn.running_mean, mean), (bn.running_var, variance * (n / (n - 1)))):
        running = uncounted(kept)
        if isinstance(momentum, Tensor):
            running.copy_(running * (1 - momentum) + new * momentum)
        else:
            torch.add(new * momentum, running, alpha=1 - momentum, out=running)
