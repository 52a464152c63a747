"""What the processes of a group, whose batches are one for the statistics, tell each other. Compiled code calls it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__: list[str] = []

torch.library.define("ceit::_leff_gather_moments", "(Tensor moments, Tensor count, str group) -> (Tensor, Tensor)")
torch.library.define("ceit::_leff_sum_over_processes", "(Tensor sums, str group) -> Tensor")


@torch.library.impl("ceit::_leff_gather_moments", "default")
def _gather_moments(moments: Tensor, count: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """The moments (P, 2, channels) of P processes, mean and centred sum of squares, and of how many tokens each (P,).

    Args:
        moments: (2, channels), mean and variance of this process's tokens.
        count: (1,), how many these are.
        group: the processes' name.
    """
    mine = torch.cat((moments[0], moments[1] * count, count))
    processes = dist.distributed_c10d._resolve_process_group(group)
    everyone = mine.new_empty(dist.get_world_size(processes) * mine.numel())  # flat, as gloo wants it
    dist.all_gather_into_tensor(everyone, mine, group=processes)
    everyone = everyone.view(-1, mine.numel())
    return everyone[:, :-1].contiguous().view(-1, 2, moments.shape[1]), everyone[:, -1].contiguous()


@torch.library.impl("ceit::_leff_sum_over_processes", "default")
def _sum_over_processes(sums: Tensor, group: str) -> Tensor:
    """The sum of what the images of all processes add (B, 2, channels): (1, 2, channels)."""
    sums = sums.sum(0, keepdim=True)
    dist.all_reduce(sums, group=dist.distributed_c10d._resolve_process_group(group))
    return sums
