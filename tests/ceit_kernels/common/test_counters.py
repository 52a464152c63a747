"""Counters at zero: kept for a stream, and a graph's own."""

from types import SimpleNamespace

import pytest
import torch

from ceit_kernels.common import counters as module
from ceit_kernels.common.counters import counters
from ceit_kernels.common.launch import record_launches

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there; its stream, and whether a graph is captured."""
    state = SimpleNamespace(cuda_stream=1, capturing=False)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, dtype, device: zeros(*sizes, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state)
    monkeypatch.setattr(module, "is_capturing", lambda: state.capturing)
    return state


def test_a_stream_keeps_its_counters_and_another_has_others(gpu):
    first = counters(3, GPU)
    assert (first.shape, first.dtype, first.any().item()) == ((3,), torch.int32, False)
    assert counters(3, GPU) is first
    assert counters(4, GPU).shape == (4,)
    gpu.cuda_stream = 2
    assert counters(3, GPU) is not first


def test_launches_of_a_graph_never_share_counters_with_what_runs_beside_it(gpu):
    kept, gpu.capturing = counters(3, GPU), True
    captured = [counters(3, GPU) for _ in range(2)]
    assert captured[0] is not captured[1]
    assert all(c is not kept and not c.any() for c in captured)
    gpu.capturing = False
    assert counters(3, GPU) is kept


def test_so_many_streams_take_no_more_memory(gpu, monkeypatch):
    monkeypatch.setattr(module, "_LIMIT", 2)
    for gpu.cuda_stream in range(5):
        counters(3, GPU)
    assert len(module._kept) == 2


def test_a_record_and_the_cpu_keep_none(gpu):
    with record_launches(), torch._subclasses.FakeTensorMode():
        assert counters(3, torch.device("cpu")).shape == (3,)
    assert counters(3, torch.device("cpu")) is not counters(3, torch.device("cpu"))
    assert not module._kept
