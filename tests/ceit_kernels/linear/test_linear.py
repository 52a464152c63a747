"""The linear layer on the CPU against plain PyTorch."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import assert_as_accurate_over_draws
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ceit_kernels import BackendError, FusedLinear, use_backend
from ceit_kernels.linear import cpu

NAMES = ("out", "x.grad", "weight.grad", "bias.grad")
DRAWS = 8


@pytest.fixture(autouse=True)
def on_the_cpu():
    with use_backend("linear=native"):
        yield


def make_call(shape, out_features, dtype, bias=True, draw=0):
    generator = torch.Generator().manual_seed(draw)
    layer = FusedLinear(shape[-1], out_features, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    x, grad_out = (torch.randn(*size, generator=generator) for size in (shape, (*shape[:-1], out_features)))
    return layer.to(dtype), x.to(dtype), grad_out.to(dtype)


def run(backend, layer, x, grad_out):
    x = x.detach().requires_grad_()
    with use_backend(f"linear={backend}"):
        out = layer(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], grad_out)]


def compute(layer, x, grad_out):
    """Results: of the backend, plain and exact."""
    exact = run("reference", copy.deepcopy(layer).double(), x.double(), grad_out.double())
    return (*(run(backend, layer, x, grad_out) for backend in ("native", "reference")), exact)


def check(make):
    """The error rule over draws that ``make`` gives; in float64 to rounding."""
    layer, x, grad_out = make(0)
    if x.dtype == torch.float64:
        fused, plain, _ = compute(layer, x, grad_out)
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    else:
        names = NAMES[: 2 + len(list(layer.parameters()))]
        assert_as_accurate_over_draws(names, (compute(*make(draw)) for draw in range(DRAWS)))


def draws_of(*call):
    return lambda draw: make_call(*call, draw=draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "out_features"), [((3, 50, 48), 144), ((2, 7, 40), 10), ((1, 33), 5), ((9,), 4)])
def test_agrees_with_plain_pytorch(poisoned_memory, shape, out_features, bias, dtype):
    check(draws_of(shape, out_features, dtype, bias))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 500), in_features=st.integers(1, 150), out_features=st.integers(1, 150))
def test_agrees_at_any_size(rows, in_features, out_features):
    check(draws_of((rows, in_features), out_features, torch.float64))
    layer, x, grad_out = make_call((rows, in_features), out_features, torch.float32)
    fused, plain = (run(backend, layer, x, grad_out) for backend in ("native", "reference"))
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=2e-4)
    check(draws_of((rows, in_features), out_features, torch.bfloat16))


def test_takes_strided_and_expanded_inputs_and_gradients():
    def strided(draw):
        layer, x, grad_out = make_call((4, 6, 32), 24, torch.float32, draw=draw)
        return layer, x.transpose(0, 1).contiguous().transpose(0, 1), grad_out[:1].expand_as(grad_out)

    def expanded(draw):
        layer, x, grad_out = make_call((4, 6, 32), 24, torch.float32, draw=draw)
        return layer, x[:, :, :1].expand_as(x), grad_out

    check(strided)
    check(expanded)


def test_an_empty_batch_gives_empty_results_and_zero_gradients():
    layer, x, grad_out = make_call((0, 6, 32), 24, torch.float32)
    out, grad_x, grad_weight, grad_bias = run("native", layer, x, grad_out)
    assert out.shape == (0, 6, 24)
    assert grad_x.shape == x.shape
    assert not grad_weight.any()
    assert not grad_bias.any()


def test_inference_follows_a_weight_that_changes():
    layer, x, _ = make_call((5, 32), 24, torch.float32)
    layer.eval()
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
        layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
        torch.testing.assert_close(layer(x), layer.bias.expand(5, 24))


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_frozen_inputs_get_no_gradient_and_the_others_the_same(needed):
    layer, x, grad_out = make_call((5, 32), 24, torch.float32)
    expected = dict(zip(NAMES, run("native", layer, x, grad_out), strict=True))
    layer.requires_grad_(False)
    leaf = x.requires_grad_() if needed == "x" else getattr(layer, needed).requires_grad_()
    layer(x).backward(grad_out)
    torch.testing.assert_close(leaf.grad, expected[f"{needed}.grad"], rtol=0, atol=0)


def test_autocast_computes_in_bfloat16_and_gives_gradients_of_the_leaves_dtypes():
    layer, x, grad_out = make_call((5, 32), 24, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        fused, plain = (run(backend, layer, x, grad_out.bfloat16()) for backend in ("native", "reference"))
        inference = layer(x.requires_grad_(False)).detach()
    assert [t.dtype for t in fused] == [torch.bfloat16, *[torch.float32] * 3]
    torch.testing.assert_close(fused, plain, rtol=0.02, atol=0.2)
    torch.testing.assert_close(inference, plain[0], rtol=0.02, atol=0.2)


def test_keeps_its_input_and_weight_for_backward_and_nothing_else():
    layer, x, _ = make_call((5, 32), 24, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), layer.weight.data_ptr()]


class _Operators(TorchDispatchMode):
    """Records the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("rows", "by_kernels"), [(8, False), (1024, True)])
def test_few_multiply_adds_are_left_to_plain_pytorch(rows, by_kernels, training):
    layer, x, _ = make_call((rows, 64), 64, torch.float32)
    with use_backend("auto"), torch.set_grad_enabled(training), _Operators() as operators:
        layer(x)
    assert ("ceit.linear.default" in operators.names) == by_kernels
    with use_backend("auto"), mock.patch.object(cpu, "linear", wraps=cpu.linear) as gemm:
        layer(x)
    assert gemm.call_count == by_kernels


@pytest.mark.parametrize("bias", [True, False])
def test_registration_passes_pytorchs_own_checks(bias):
    layer, x, grad_out = make_call((3, 8), 5, torch.float32, bias)
    torch.library.opcheck(torch.ops.ceit.linear, (x.requires_grad_(), layer.weight, layer.bias, None, "native"))
    torch.library.opcheck(
        torch.ops.ceit.linear_backward, (grad_out, x.detach(), layer.weight.detach(), True, True, bias, None, "native")
    )


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_registration_of_a_gradient_in_part_passes_pytorchs_own_checks(needs):
    layer, x, grad_out = make_call((3, 8), 5, torch.float32)
    arguments = (grad_out, x, layer.weight.detach(), *needs, torch.bfloat16, "native")
    torch.library.opcheck(torch.ops.ceit.linear_backward, arguments)


@pytest.mark.parametrize("registered", [True, False])
def test_gradients_are_those_of_finite_differences(registered):
    layer, x, _ = make_call((3, 4), 5, torch.float64)

    def call(x, weight, bias):
        if registered:
            return torch.ops.ceit.linear(x, weight, bias, None, "native")
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), layer.weight, layer.bias))


def test_second_derivatives_are_refused_and_left_to_the_reference():
    layer, x, _ = make_call((3, 4), 5, torch.float64)
    (grad,) = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="FusedLinear is differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_compiles_and_exports_without_a_break(training):
    layer, x, grad_out = make_call((3, 8), 5, torch.float32)
    layer.train(training)
    expected = run("native", layer, x, grad_out)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run("native", compiled, x, grad_out), expected)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), expected[0])


def test_fuses_over_the_same_state():
    plain = nn.Linear(8, 5)
    fused = FusedLinear.from_plain(plain)
    assert fused.weight is plain.weight
    assert list(fused.state_dict()) == list(plain.state_dict())


BAD_CALLS = {
    "width": (lambda layer: layer(torch.zeros(2, 7)), ValueError, r"x: expected shape \(2, 8\), got \(2, 7\)"),
    "dtype": (lambda layer: layer(torch.zeros(2, 8).double()), TypeError, "x: expected torch.float32 like weight"),
    "backend": (
        lambda layer: torch.ops.ceit.linear(torch.zeros(2, 8), layer.weight, None, None, "triton"),
        BackendError,
        "linear has no triton implementation",
    ),
    "weight": (
        lambda layer: torch.ops.ceit.linear(torch.zeros(2, 9), layer.weight, None, None, "native"),
        ValueError,
        r"weight: expected shape \(N, 9\), got \(5, 8\)",
    ),
    "bias": (
        lambda layer: torch.ops.ceit.linear(torch.zeros(2, 8), layer.weight, torch.zeros(4), None, "native"),
        ValueError,
        r"bias: expected shape \(5\), got \(4,\)",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_argument_is_named_with_what_was_given_and_expected(call, error, message):
    with pytest.raises(error, match=message):
        call(FusedLinear(8, 5))
