"""Train and evaluate sharded models in the processes of a group, beside plain ones with gradients averaged by hand.

usage: torchrun ... sharded.py RESULT.json: how far apart the two are, or what went wrong, for every way of sharding.
"""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from ceit import CeiT
from ceit.blocks import Block
from ceit_kernels import fuse
from ceit_kernels.common.sync_norm import SyncBatchNorm2d

STEPS = 2


def ddp(model: nn.Module) -> nn.Module:
    # Each process keeps its own statistics, as those of the other ways do.
    return DistributedDataParallel(model, broadcast_buffers=False)


def fsdp2(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.blocks, model.i2t, model.lca):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2_inside_blocks(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        for module in (block.attn, block.leff, block):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1(model: nn.Module, use_orig_params: bool = True, **settings: object) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params, **settings)


def fsdp1_of_blocks(use_orig_params: bool) -> Callable[[nn.Module], nn.Module]:
    return lambda model: fsdp1(model, use_orig_params, auto_wrap_policy=ModuleWrapPolicy({Block}))


def checkpointed(shard: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        for index, block in enumerate(model.blocks):
            model.blocks[index] = checkpoint_wrapper(block)
        return shard(model)

    return wrap


WAYS = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2 inside blocks": fsdp2_inside_blocks,
    "fsdp1": fsdp1,
    "fsdp1 of blocks": fsdp1_of_blocks(True),
    "fsdp1 flat": lambda model: fsdp1(model, False),
    "fsdp1 flat of blocks": fsdp1_of_blocks(False),
    "ddp, checkpointed": checkpointed(ddp),
    "fsdp2, checkpointed": checkpointed(fsdp2),
    "fsdp1 of blocks, checkpointed": checkpointed(fsdp1_of_blocks(True)),
}


def make_model(with_bn: bool) -> nn.Module:
    torch.manual_seed(0)
    settings = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    return CeiT(**settings, leff_with_bn=with_bn).double()


def step(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer, average: bool) -> tuple[Tensor, Tensor]:
    """Logits of a training step, and those of the evaluation behind it."""
    model.train()
    optimizer.zero_grad()
    logits = model(images)
    logits.square().mean().backward()
    if average:
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, dist.ReduceOp.SUM)
            parameter.grad /= dist.get_world_size()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        return logits.detach(), model(images)


def distance(way: str, fused: bool) -> float:
    """The largest difference of logits, as a part of the largest of them."""
    # PyTorch's own wrapper counts a batch twice in running statistics, whatever the model.
    plain = make_model(with_bn="checkpointed" not in way)
    model = copy.deepcopy(plain)
    model = WAYS[way](fuse(model) if fused else model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.9) for m in (model, plain)]
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    worst = 0.0
    for _ in range(STEPS):
        images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=generator)
        found = step(model, images, optimizers[0], average=False)
        expected = step(plain, images, optimizers[1], average=True)
        for a, b in zip(found, expected, strict=True):
            worst = max(worst, ((a - b).abs().max() / b.abs().max()).item())
    return worst


def distance_to_one_process(way: str, fused: bool) -> float:
    """The same for norms over all processes, to one process with the whole batch, on digits."""
    plain = make_model(with_bn=True)
    model = copy.deepcopy(plain)
    SyncBatchNorm2d.convert(model)
    model = WAYS[way](fuse(model) if fused else model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.9) for m in (model, plain)]
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    worst = 0.0
    for images in digits().split(8)[:STEPS]:
        found = step(model, images[mine], optimizers[0], average=False)
        expected = step(plain, images, optimizers[1], average=False)
        for a, b in zip(found, expected, strict=True):
            worst = max(worst, ((a - b[mine]).abs().max() / b.abs().max()).item())
    buffers = dict(plain.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name.removeprefix("module.")], rtol=1e-9, atol=1e-12)
    return worst


def digits() -> Tensor:
    """Images of digits, 32 pixels wide."""
    images = torch.from_numpy(load_digits().images)[:, None] / 16
    return nn.functional.interpolate(images, scale_factor=4).expand(-1, 3, -1, -1)


def outcome(measure: Callable[[str, bool], float], way: str, fused: bool) -> float | str:
    try:
        return measure(way, fused)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


MEASURES = {"": (distance, [*WAYS]), ", one batch": (distance_to_one_process, ["ddp", "fsdp2"])}
# Of plain models one of each wrapper shows that the comparison is right.
KINDS = {way: ("plain", "fused") if way in ("ddp", "fsdp2", "fsdp1") else ("fused",) for way in WAYS}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {
        f"{way}{name}, {kind}": outcome(measure, way, kind == "fused")
        for name, (measure, ways) in MEASURES.items()
        for way in ways
        for kind in KINDS[way]
    }
    Path(sys.argv[1]).with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
