"""Graphed modules, with a GPU that is not there, and on one."""

import contextlib
import copy
import logging
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import where
from support.changes import CHANGES, Inapplicable, Live
from support.fake_graphs import FakeGraphs
from torch import nn
from torch.overrides import TorchFunctionMode

from ceit import CeiT, layers
from ceit_kernels import fuse, graphed, graphs, use_backend

CEIT = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5, "mlp_ratio": 2.0}
DROPPING = {"attn_drop_rate": 0.2, "drop_path_rate": 0.2, "proj_drop_rate": 0.1}


@pytest.fixture
def fake(monkeypatch):
    """Captures and replays, of plain PyTorch."""
    with use_backend("reference"):
        yield FakeGraphs(monkeypatch)


class Function(nn.Module):
    """A module of a function, with a parameter."""

    def __init__(self, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(8)), function

    def forward(self, x):
        return self.function(self, x)


def without_graphs():
    return mock.patch.object(graphs, "inputs_reason", return_value="not here")


def inputs(number, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def train(model, module, batches, device="cpu", accumulate=1):
    """The losses of some steps, which draw numbers."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for number, batch in enumerate(batches):
        loss = model(inputs(number, batch, 3, 32, 32).to(device)).square().mean()
        loss.backward()
        if number % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad(set_to_none=number % 2 == 1)
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_has_the_numbers_that_it_has_without_graphs(fake, accumulate):
    """Random numbers, running statistics and gradients included, bit for bit."""
    model = fuse(CeiT(**CEIT, **DROPPING))
    twin, batches = copy.deepcopy(model), [4] * 7 + [3] * 2 + [4] * 3
    found = train(graphed(model), model, batches, accumulate=accumulate)
    assert (fake.captured, fake.replayed) == (2, 2 * 7)
    assert torch.equal(found, train(twin, twin, batches, accumulate=accumulate))
    for name, tensor in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.kernels
@pytest.mark.skipif(not where.UNDER_TTSEM, reason="the interpreter pretends no GPU, and on one there are graphs")
def test_the_triton_kernels_are_captured_and_replayed(monkeypatch):
    """As registered operators, which here are what is taken down in a capture."""
    leff = fuse(layers.LocallyEnhancedFeedForward(16, 32))
    twin, x = copy.deepcopy(leff), torch.randn(2, 10, 16)
    fake, call = FakeGraphs(monkeypatch), graphed(leff)
    with use_backend("leff=triton"):
        for number in range(5):
            found, expected = ([module(number + x), *module.buffers()] for module in (call, twin))
            for results, module in ((found, leff), (expected, twin)):
                results += torch.autograd.grad(results[0].sin().sum(), list(module.parameters()))
            torch.testing.assert_close(found, expected)
    assert (fake.captured, fake.replayed) == (2, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("distributed", [False, True])
def test_on_a_gpu_training_has_the_losses_that_it_has_without_graphs(distributed, tmp_path):
    model = fuse(CeiT(**{**CEIT, "embed_dim": 64}, drop_path_rate=0.2)).cuda()
    twin, batches = copy.deepcopy(model), [4] * 7 + [3] * 2 + [4] * 3
    expected = train(twin, twin, batches, "cuda")
    with one_process("nccl", tmp_path) if distributed else contextlib.nullcontext():
        called = graphed(model)
        called = nn.parallel.DistributedDataParallel(called, device_ids=[0]) if distributed else called
        torch.testing.assert_close(train(called, model, batches, "cuda"), expected, rtol=1e-3, atol=1e-4)
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_on_a_gpu_torch_compile_captures_graphs_of_a_fused_model(training):
    model = fuse(CeiT(**{**CEIT, "embed_dim": 64})).cuda()
    twin, batches = copy.deepcopy(model), [4] * 6
    compiled = torch.compile(model, mode="reduce-overhead")
    with torch.set_grad_enabled(training):
        if training:
            found, expected = train(compiled, model, batches, "cuda"), train(twin, twin, batches, "cuda")
        else:
            x = [inputs(number, 4, 3, 32, 32).cuda() for number in range(4)]
            found, expected = (torch.stack([each(y).clone() for y in x]) for each in (compiled.eval(), twin.eval()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@contextlib.contextmanager
def one_process(backend, folder):
    dist.init_process_group(backend, init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_a_graphed_model_is_trained_by_distributed_processes(fake, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.BatchNorm1d(8))
    twin, batches = copy.deepcopy(model), [4] * 7
    with one_process("gloo", tmp_path):
        found = train(nn.parallel.DistributedDataParallel(graphed(model)), model, batches)
        assert (fake.captured, fake.replayed) == (2, 8)
        assert torch.equal(found, train(nn.parallel.DistributedDataParallel(twin), twin, batches))
        with pytest.raises(ValueError, match="model: expected a model that no process shares yet, got Distributed"):
            graphed(nn.Sequential(nn.parallel.DistributedDataParallel(model)))


@pytest.mark.parametrize("change", dict.fromkeys(CHANGES), ids=lambda change: change.__name__)
def test_whatever_is_done_to_a_model_is_followed(fake, change):
    leff = layers.LocallyEnhancedFeedForward(8, 16).double()
    live = Live(graphed(leff), torch.randn(2, 5, 8, dtype=torch.float64), 0)

    def step(training):
        buffers = [buffer.clone() for buffer in live.model.buffers()]
        out = live.model.train(training)(live.x)
        leaves = [p for p in live.model.parameters() if p.requires_grad] if training else []
        grads = torch.autograd.grad(out.sum(), leaves, materialize_grads=True) if leaves else ()
        results = [out.detach(), *grads, *(buffer.clone() for buffer in live.model.buffers())]
        for buffer, before in zip(live.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        return results

    def steps():
        for training in [True] * 5 + [False] * 3:
            with torch.set_grad_enabled(training):
                found = step(training)
                with without_graphs():
                    torch.testing.assert_close(found, step(training))

    steps()
    assert (fake.captured, fake.replayed) == (3, 6)
    try:
        with contextlib.suppress(Inapplicable):
            change(live)
        steps()
    finally:
        while live.undo:
            live.undo.pop()()
    steps()


class Larger(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        return 1.25 * out if function is F.linear else out


def larger(method):
    return lambda *arguments, **options: 1.25 * method(*arguments, **options)


REPLACED = {
    "a function": lambda: mock.patch.object(F, "linear", larger(F.linear)),
    "a mode": Larger,
    "a method": lambda: mock.patch.object(nn.LayerNorm, "forward", larger(nn.LayerNorm.forward)),
    "a private method": lambda: mock.patch.object(nn.Conv2d, "_conv_forward", larger(nn.Conv2d._conv_forward)),
}


@pytest.mark.parametrize("replaced", REPLACED.values(), ids=REPLACED)
@torch.no_grad()
def test_what_is_put_in_the_place_of_a_function_or_a_method_is_called(fake, replaced):
    model, x = fuse(CeiT(**CEIT)).eval(), inputs(0, 2, 3, 32, 32)
    call, expected = graphed(model), model(x)
    for _ in range(3):
        torch.testing.assert_close(call(x), expected)
    assert fake.replayed == 2
    with replaced():
        other = model(x)
        assert not torch.allclose(other, expected, rtol=1e-3)
        for _ in range(3):
            torch.testing.assert_close(call(x), other)
    torch.testing.assert_close(call(x), expected)


def test_a_cast_that_autocast_keeps_does_not_hide_a_new_weight(fake):
    model = nn.Linear(8, 4)
    call, x = graphed(model), inputs(0, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for number in range(6):
            with torch.no_grad():
                model.weight.fill_(number)
                model.weight.data += 0
            torch.clear_autocast_cache()
            model(x)  # keeps a cast of the weight
            with without_graphs():
                expected = torch.nn.functional.linear(x, model.weight.detach(), model.bias)
            assert torch.equal(call(x), expected)
    assert fake.captured == 2


def test_calls_of_another_kind_have_graphs_of_their_own(fake):
    model = Function(lambda self, x: {"sum": x["a"] * self.weight + x["b"][0], "number": x["b"][1], "sign": x["a"] > 0})
    call = graphed(model)
    for a in (inputs(0, 4, 8), inputs(1, 1, 8), inputs(2, 8, 4).t(), inputs(3, 4, 8).double()):
        for number in (1, 2):
            for factor in range(5):
                x = {"a": factor * a, "b": (torch.ones(8), number)}
                found, expected = call(x), model(x)
                assert (found["number"], found["sum"].dtype) == (number, expected["sum"].dtype)
                assert torch.equal(found["sum"], expected["sum"])
                assert torch.equal(found["sign"], expected["sign"])
                assert not found["sign"].requires_grad
    assert fake.captured == 16
    with torch.no_grad(), use_backend("auto"):
        call(x)
    call.eval()(x)
    assert fake.captured == 16


def test_results_and_gradients_stay(fake):
    model = nn.Linear(8, 4)
    call, xs = graphed(model), [inputs(number, 2, 8).requires_grad_() for number in range(6)]
    found = []
    for x in xs:
        out = call(x)
        found.append((out, torch.autograd.grad(out.sin().sum(), [x, *model.parameters()])))
    for x, (out, grads) in zip(xs, found, strict=True):
        assert torch.equal(out, model(x))
        assert all(map(torch.equal, grads, torch.autograd.grad(model(x).sin().sum(), [x, *model.parameters()])))


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (lambda call, model, out, x: call(x), "expected backward ahead of the next call"),
        (lambda call, model, out, x: out.sum().backward(retain_graph=True), "expected backward ahead of the next call"),
        (lambda call, model, out, x: model.weight.data.add_(1).add_(model.weight.detach().add_(1)), "ahead of changes"),
    ],
    ids=["another call", "backward", "another weight"],
)
def test_backward_of_what_was_overwritten_is_an_error(fake, between, message):
    model = nn.Linear(8, 4)
    call, x = graphed(model), inputs(0, 2, 8)
    for _ in range(4):
        call(x).sum().backward()
    out = call(x)
    between(call, model, out, x)
    with pytest.raises(RuntimeError, match=message):
        out.sum().backward()
    call(x).sum().backward()


def test_second_derivatives_are_an_error(fake):
    call, x = graphed(nn.Linear(8, 4)), inputs(0, 2, 8).requires_grad_()
    for _ in range(4):
        out = call(x).square()
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda self, x: x * float(x.sum()), "cannot be captured in a CUDA graph: operation not permitted"),
        (lambda self, x: x.mul_(2), "cannot be captured in a CUDA graph: it changes its input in place"),
    ],
    ids=["waits", "writes"],
)
@pytest.mark.parametrize("grad", [False, True])
def test_what_no_graph_can_hold_is_an_error(fake, function, message, grad):
    call = graphed(Function(function))
    with torch.set_grad_enabled(grad):
        for number in range(3 if grad else 1):
            call(inputs(number, 2, 8))
        with pytest.raises(RuntimeError, match=message):
            call(inputs(0, 2, 8))


def test_calls_that_no_graph_serves_run_as_they_are_and_it_is_said(monkeypatch, caplog):
    model = nn.Sequential(nn.Linear(8, 4))
    call, seen, x = graphed(model), [], inputs(0, 2, 8)
    for _ in range(5):
        assert torch.equal(call(x), model(x))
    fake = FakeGraphs(monkeypatch)
    handles = [model[0].register_forward_hook(lambda *_: seen.append("forward"))]
    handles += [model[0].weight.register_hook(lambda grad: seen.append("grad"))]
    for _ in range(5):
        call(x).sum().backward()
    assert seen == ["forward", "grad"] * 5
    handles.pop(0).remove()
    for _ in range(5):
        call(x).sum().backward()
    assert seen[10:] == ["grad"] * 5
    torch.func.vmap(call)(x)
    synchronised = graphed(nn.SyncBatchNorm(8).eval())
    with monkeypatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        for _ in range(5):
            synchronised(x)
    assert fake.captured == 0
    messages = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [message.partition(": ")[2] for message in messages] == [
        "its inputs are not all on one GPU",
        "a module has a hook",
        "a parameter has a hook",
        "a mode, a transform or a class of tensors sees the call",
        "norms exchange statistics with other processes",
    ]
