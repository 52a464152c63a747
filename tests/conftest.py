import pytest
import torch
from support import instances, where

from ceit_kernels import backends
from ceit_kernels.common import counters, plan

if where.UNDER_TTSEM:
    from ttsem import pidraces

    instances.teach_tickets(pidraces)


def pytest_collection_modifyitems(config, items):
    """Leave out, visibly, what this run cannot execute; ``make test`` runs each group where it can."""

    def runs_here(item):
        if item.get_closest_marker("gpu"):
            return where.ON_GPU
        kernels = item.get_closest_marker("kernels")
        if kernels:
            return where.KERNELS_RUN and (kernels.kwargs.get("ttsem", True) or not where.UNDER_TTSEM)
        return not (where.INTERPRETING or where.UNDER_TTSEM)

    left_out = [item for item in items if not runs_here(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if runs_here(item)]


@pytest.fixture(autouse=True)
def draw_the_same_numbers():
    """Whichever tests ran before, in this process or in another."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def decide_and_plan_again():
    """What a test made the machine look like does not choose the backends and tiles of the next."""
    backends._chosen.clear()
    plan._plans.clear()
    counters._kept.clear()
    counters._left.clear()


@pytest.fixture
def poisoned_memory(monkeypatch):
    """New tensors hold NaN until they are written, as ttsem has it."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.dtype.is_floating_point else tensor

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
