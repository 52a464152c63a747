"""CUDA graphs of snapshots, with a GPU that is not there."""

import torch
from support.fake_graphs import FakeGraphs
from torch import nn

from ceit_kernels import freeze, use_backend


def test_a_graph_is_captured_at_the_second_call_of_a_kind_and_replayed(monkeypatch):
    graphs = FakeGraphs(monkeypatch)
    model = nn.GELU()
    frozen, x = freeze(model, cuda_graphs=True), torch.randn(4, 8)
    for each in (x, x[:2], x.double(), torch.randn(8, 4).t()):
        for factor in range(3):
            assert torch.equal(frozen(factor * each), model(factor * each))
    assert (graphs.captured, graphs.replayed, len(frozen._graphs)) == (4, 8, 4)
    with use_backend("reference"):
        frozen(x)
    assert (graphs.captured, graphs.replayed) == (4, 8)
    first = frozen(x)
    kept = first.clone()
    frozen(x + 1)
    assert torch.equal(first, kept), "a later call leaves results alone"


def test_a_graph_captured_in_inference_mode_takes_inputs_outside_of_it(monkeypatch):
    graphs = FakeGraphs(monkeypatch)
    frozen, x = freeze(nn.GELU(), cuda_graphs=True), torch.randn(4, 8)
    with torch.inference_mode():
        frozen(x)
        frozen(x)
    frozen(x)
    assert graphs.replayed == 2


def test_no_graph_hides_a_hook_or_is_used_unasked(monkeypatch):
    graphs = FakeGraphs(monkeypatch)
    x = torch.randn(4, 8)
    unasked = freeze(nn.GELU())
    frozen, calls = freeze(nn.Sequential(nn.GELU()), cuda_graphs=True), []
    frozen.model[0].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        unasked(x)
        frozen(x)
    assert (graphs.captured, len(calls)) == (0, 3)


def test_a_part_that_is_put_in_the_place_of_another_runs_without_graphs(monkeypatch):
    graphs = FakeGraphs(monkeypatch)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.randn(4, 8)
    frozen = freeze(model, cuda_graphs=True)
    for _ in range(3):
        assert torch.equal(frozen(x), model(x))
    assert (graphs.captured, graphs.replayed) == (1, 2)
    frozen.model[1] = model[1] = nn.ReLU()
    assert torch.equal(frozen(x), model(x))
    assert graphs.replayed == 2
