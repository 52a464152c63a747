"""BatchNorm whose statistics span the batches of several processes."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .running import uncounted

__all__ = ["BATCH_NORMS", "SyncBatchNorm2d", "gather_moments", "process_group_of_norm", "sum_over_processes"]


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over the batches of all processes, on the CPU too.

    ``torch.nn.SyncBatchNorm`` takes tensors on GPUs alone, and ``DistributedDataParallel`` on the CPU refuses it.

    Attributes:
        process_group: the processes; all of them if None.
    """

    process_group: dist.ProcessGroup | None = None

    @staticmethod
    def convert(model: nn.Module) -> None:
        """Make one of every BatchNorm2d in a model, in place."""
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SyncBatchNorm2d

    def forward(self, input: Tensor) -> Tensor:
        """Normalise images (B, C, H, W); the same shape and dtype."""
        group = process_group_of_norm(self)
        if group is None:
            return super().forward(input)
        self._check_input_dim(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        count = x.new_tensor([x.numel() // max(x.shape[1], 1)])
        total = _sum_over(torch.cat((x.sum((0, 2, 3)), count)), group)
        mean, count = total[:-1] / total[-1], total[-1].detach()
        centred = x - mean[:, None, None]
        variance = _sum_over(centred.square().sum((0, 2, 3)), group) / count
        if self.track_running_stats:
            self._follow(mean.detach(), variance.detach() * (count / (count - 1)))
        out = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            out = out * self.weight[:, None, None] + self.bias[:, None, None]
        return out.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        batches = cast("Tensor", self.num_batches_tracked).add_(1)
        share = 1.0 / float(batches) if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            kept = uncounted(cast("Tensor", running))
            kept.lerp_(new.to(kept.dtype), share)


# What the kernels take for a BatchNorm.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d)


def process_group_of_norm(norm: nn.Module) -> dist.ProcessGroup | None:
    """The processes over whose batches a norm takes its statistics; None for this one alone."""
    if not (norm.training and isinstance(norm, (nn.SyncBatchNorm, SyncBatchNorm2d))):
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def gather_moments(moments: Tensor, count: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """The moments (P, 2, channels) of P processes, mean and centred sum of squares, and of how many tokens each (P,).

    Args:
        moments: (2 or more, channels), mean and variance of this process's tokens first.
        count: (1,), how many these are.
        group: the processes' name.
    """
    mine = torch.cat((moments[0], moments[1] * count, count))
    processes = dist.distributed_c10d._resolve_process_group(group)
    everyone = mine.new_empty(dist.get_world_size(processes) * mine.numel())  # flat, as gloo wants it
    dist.all_gather_into_tensor(everyone, mine, group=processes)
    everyone = everyone.view(-1, mine.numel())
    return everyone[:, :-1].contiguous().view(-1, 2, moments.shape[1]), everyone[:, -1].contiguous()


def sum_over_processes(sums: Tensor, group: str) -> Tensor:
    """The sum over the first dimension and the processes of a group: (n, ...) becomes (1, ...)."""
    sums = sums.sum(0, keepdim=True)
    dist.all_reduce(sums, group=dist.distributed_c10d._resolve_process_group(group))
    return sums


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_over(grads[0], ctx.group), None


def _sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of a tensor over processes, which a gradient passes."""
    return cast("Tensor", _Sum.apply(x, group))
