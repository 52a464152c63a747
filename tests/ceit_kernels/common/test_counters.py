"""Counters at zero: kept for a stream, and a captured call's own."""

from types import SimpleNamespace

import pytest
import torch

from ceit_kernels.common import counters as module
from ceit_kernels.common.counters import counters
from ceit_kernels.common.launch import record_launches

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there; its stream, whether a graph is captured, and what was zeroed and waited for."""
    state = SimpleNamespace(cuda_stream=1, capturing=False, seen=[])
    state.synchronize = lambda: state.seen.append("waited")
    zeros = torch.zeros

    def make(count, dtype, device):
        state.seen.append(count)
        return zeros(count, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", make)
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


def test_no_other_call_gets_the_counters_of_a_captured_one_which_the_graph_need_not_zero(gpu, monkeypatch):
    monkeypatch.setattr(module, "_OF_GRAPHS", 128)
    kept = counters(3, GPU)
    assert gpu.seen == [128, "waited", 3]
    captured = []
    for gpu.cuda_stream in (1, 2):  # graphs one after another, streams within one: all the same
        gpu.capturing = True
        captured += [counters(33, GPU)]
        gpu.capturing = False
        assert counters(3, GPU) is not captured[-1]
    gpu.cuda_stream = 1
    assert counters(3, GPU) is kept
    assert gpu.seen == [128, "waited", 3, 3]
    assert [(c.shape, c.any().item()) for c in captured] == [((33,), False)] * 2
    assert captured[1].data_ptr() - captured[0].data_ptr() == 4 * 64  # where a tensor of its own might start


def test_where_none_are_left_for_graphs_each_replay_zeroes_its_own(gpu, monkeypatch):
    monkeypatch.setattr(module, "_OF_GRAPHS", 64)
    gpu.capturing = True
    first = counters(3, GPU)
    assert gpu.seen == [3]
    gpu.capturing = False
    counters(3, GPU)
    gpu.capturing, gpu.seen = True, []
    found = [first, *(counters(32, GPU) for _ in range(4))]
    assert gpu.seen == [32, 32]
    assert len({c.data_ptr() for c in found}) == len(found)


def test_a_call_that_is_not_eager_leaves_nothing_behind(gpu):
    found = [counters(3, GPU, eager=False) for _ in range(2)]
    assert gpu.seen == [3, 3]
    assert found[0].data_ptr() != found[1].data_ptr()
    assert not module._kept
    assert not module._left


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
