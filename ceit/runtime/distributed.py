"""The processes of a run: one, or those that torchrun or SLURM starts."""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.utils import is_distributed_env
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor, nn

from .errors import UsageError


@dataclass(frozen=True)
class Place:
    """Where this process stands."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def primary(self) -> bool:
        """Whether this process writes and logs."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether there are other processes."""
        return self.world_size > 1

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.distributed:
            torch.distributed.barrier()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum each of the values over all processes."""
        return self.total(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def total(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.distributed:
            torch.distributed.all_reduce(tensor)
        return tensor


@contextmanager
def processes(device: str) -> Iterator[Place]:
    """Join the processes that torchrun or SLURM's srun started, if one did, and take a device.

    Args:
        device: "cpu", "cuda", "cuda:N", or "auto" for a GPU where there is one. With several processes each takes the
            GPU of its local rank.

    Raises:
        UsageError: the device does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    _prepare_slurm()
    state = init_distributed_device_so(device)
    place = Place(torch.device(state["device"]), state["global_rank"], state["world_size"])
    try:
        yield place
    finally:
        if place.distributed:
            torch.distributed.destroy_process_group()


def parallel(model: nn.Module, place: Place) -> nn.Module:
    """The model as all processes train it together, itself if there is only one."""
    if not place.distributed:
        return model
    # The gradient of a 1x1 convolution may have other strides, but only where the size is 1.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return nn.parallel.DistributedDataParallel(
        model, device_ids=[place.device] if place.device.type == "cuda" else None
    )


def _prepare_slurm() -> None:
    """Tell processes that `srun` started, without torchrun, where the first of them is."""
    if "WORLD_SIZE" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) < 2 or "SLURM_PROCID" not in os.environ:
        return
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "localhost"
    os.environ.setdefault("MASTER_ADDR", first_node(nodes))
    # Jobs that share a machine differ in their numbers.
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))


def first_node(nodes: str) -> str:
    """The first of SLURM's list of nodes, such as gpu[07-09,12],login1."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _check_device(device: str) -> None:
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if wanted.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {device}: no CUDA GPU is available to PyTorch")
        index = int(os.environ.get("LOCAL_RANK", 0)) if is_distributed_env() else wanted.index or 0
        if index >= torch.cuda.device_count():
            raise UsageError(
                f"--device {device}: there are {torch.cuda.device_count()} GPUs, number {index} is missing"
            )
    elif wanted.type != "cpu":
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}")
