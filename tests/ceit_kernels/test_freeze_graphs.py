"""CUDA graphs of snapshots, with a GPU that is not there."""

import contextlib
import sys
from unittest import mock

import torch
from torch import nn

from ceit_kernels import freeze, use_backend


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = property(lambda self: True)


class FakeGraphs:
    """What ``freeze`` takes of ``torch.cuda``, for modules on the CPU: replay computes again what was captured."""

    def __init__(self, monkeypatch):
        self.captured, self.replayed = 0, 0
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
        for name in ("Stream", "current_stream", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, lambda: mock.Mock())
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        # By its name the package has the function.
        monkeypatch.setattr(sys.modules["ceit_kernels.freeze"], "is_eager", lambda x: True)

    @contextlib.contextmanager
    def capture(self, graph):
        def replay():
            self.replayed += 1

        self.captured += 1
        graph.replay = replay
        yield


def test_a_graph_is_captured_for_each_kind_of_input_and_replayed(monkeypatch):
    graphs = FakeGraphs(monkeypatch)
    frozen = freeze(nn.GELU(), cuda_graphs=True)
    x = torch.randn(4, 8).as_subclass(OnGpu)
    inputs = [x, x + 1, x[:2], x.double(), torch.randn(8, 4).as_subclass(OnGpu).t()]
    for each in inputs:
        frozen(each)
    assert (graphs.captured, graphs.replayed) == (4, 5)
    with use_backend("reference"):
        frozen(x)
    assert (graphs.captured, graphs.replayed) == (5, 6)
    found = frozen(x + 2)
    assert found is frozen(x + 3), "the result of a replay is where it was captured"
    assert torch.equal(next(iter(frozen._graphs.values())).x, x + 3)


def test_a_graph_captured_in_inference_mode_takes_inputs_outside_of_it(monkeypatch):
    FakeGraphs(monkeypatch)
    frozen, x = freeze(nn.GELU(), cuda_graphs=True), torch.randn(4, 8).as_subclass(OnGpu)
    with torch.inference_mode():
        frozen(x)
    frozen(x)


def test_no_graph_hides_a_hook_or_is_used_unasked(monkeypatch):
    graphs = FakeGraphs(monkeypatch)
    x = torch.randn(4, 8).as_subclass(OnGpu)
    freeze(nn.GELU())(x)
    frozen, calls = freeze(nn.Sequential(nn.GELU()), cuda_graphs=True), []
    frozen.model[0].register_forward_hook(lambda *_: calls.append(1))
    frozen(x)
    frozen(x)
    assert (graphs.captured, len(calls)) == (0, 2)
