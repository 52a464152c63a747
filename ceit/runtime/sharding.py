"""Weights and optimizers sharded over processes by FSDP2, and the same calls for those that are not."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .distributed import Place

if torch.distributed.is_available():
    from torch.distributed.checkpoint import state_dict as full
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
else:
    FSDPModule = ()  # the types of what is sharded: none


def shard(model: Any, place: Place) -> None:
    """Shard a CeiT's weights over all processes, in place (FSDP2), block by block."""
    mesh = init_device_mesh(place.device.type, (place.world_size,))
    for module in (*model.blocks, model.lca, model):
        fully_shard(module, mesh=mesh)


@contextmanager
def gradients_exchanged(model: nn.Module, exchanged: bool) -> Iterator[None]:
    """Exchange gradients in the backward passes inside a `with` block, or add them up in each process."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(exchanged)
        yield
    else:
        no_sync = getattr(model, "no_sync", nullcontext)
        with nullcontext() if exchanged else no_sync():
            yield


def full_state(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """The state of a model, or of its optimizer; of sharded ones put together in the first process."""
    if not isinstance(model, FSDPModule):
        return (optimizer or model).state_dict()
    if optimizer:
        return full.get_optimizer_state_dict(model, optimizer, options=_whole())
    return full.get_model_state_dict(model, options=_whole())


def load_full_state(state: dict[str, Any], model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Load what `full_state` returned, into a model or its optimizer, sharded or not."""
    if not isinstance(model, FSDPModule):
        (optimizer or model).load_state_dict(state)
    elif optimizer:
        full.set_optimizer_state_dict(model, optimizer, state, options=_whole())
    else:
        full.set_model_state_dict(model, state, options=_whole())


def _whole() -> "full.StateDictOptions":
    return full.StateDictOptions(full_state_dict=True, cpu_offload=True)
