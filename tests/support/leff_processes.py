"""A training step of LeFF in several processes, whose SyncBatchNorms share their statistics."""

import copy

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from ceit_kernels.leff.triton import launch_backward

from .leff import train_step

IMAGES = (1, 2)  # of each process


def run_processes(leff, x, grad_out, grid_size, folder, backend="triton"):
    """The results of ``train_step`` of each process, on its share of the batch: the usual ones, and with Triton those
    whose first layer's gradients are taken as in 16 bits.
    """
    torch.save((x, grad_out, grid_size, backend), folder / "inputs.pt")
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(leff))
    torch.multiprocessing.spawn(_work, (synchronised, folder), len(IMAGES))
    return list(zip(*(torch.load(folder / f"{rank}.pt") for rank in range(len(IMAGES))), strict=True))


def _work(rank, leff, folder):
    torch.set_num_threads(1)
    x, grad_out, grid_size, backend = torch.load(folder / "inputs.pt")
    leff = copy.deepcopy(leff)  # what came with the call is shared between the processes
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=len(IMAGES))
    mine = slice(sum(IMAGES[:rank]), sum(IMAGES[: rank + 1]))
    untouched = copy.deepcopy(leff)
    result = train_step(backend, leff, x[mine], grad_out[mine], grid_size)
    compiled = torch.compile(copy.deepcopy(untouched), fullgraph=True, backend="aot_eager")
    again = train_step(backend, compiled, x[mine], grad_out[mine], grid_size)
    again = {name.replace("_orig_mod.", ""): tensor for name, tensor in again.items()}
    for name, tensor in result.items():
        # Compilers average running statistics by PyTorch's operators, eager calls in one launch.
        rounding = 1e-14 if "running" in name else 0
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=rounding, msg=lambda m, n=name: f"{n}: {m}")
    assert again.keys() == result.keys()
    results = [result]
    if backend == "triton":
        launch_backward._is_factored = lambda dtype: True
        results.append(train_step(backend, untouched, x[mine], grad_out[mine], grid_size))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
