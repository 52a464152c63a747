"""The linear layer on the CPU against plain PyTorch."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import assert_as_accurate
from torch import nn

from ceit_kernels import BackendError, FusedLinear, use_backend


@pytest.fixture(autouse=True)
def on_the_cpu():
    with use_backend("linear=native"):
        yield


def make_call(shape, out_features, dtype, bias=True):
    generator = torch.Generator().manual_seed(0)
    layer = FusedLinear(shape[-1], out_features, bias=bias).requires_grad_(False).eval()
    for parameter in layer.parameters():
        parameter.normal_(generator=generator)
    return layer.to(dtype), torch.randn(shape, generator=generator).to(dtype)


def run(backend, layer, x):
    with use_backend(f"linear={backend}"):
        return layer(x)


def check(layer, x):
    exact = run("reference", copy.deepcopy(layer).double(), x.double())
    fused, plain = (run(backend, layer, x) for backend in ("native", "reference"))
    if x.dtype == torch.float64:
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    else:
        assert_as_accurate(["out"], [fused], [plain], [exact])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "out_features"), [((3, 50, 48), 144), ((2, 7, 40), 10), ((1, 33), 5), ((9,), 4)])
def test_agrees_with_plain_pytorch(poisoned_memory, shape, out_features, bias, dtype):
    check(*make_call(shape, out_features, dtype, bias))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 70), in_features=st.integers(1, 70), out_features=st.integers(1, 70))
def test_agrees_at_any_size(rows, in_features, out_features):
    check(*make_call((rows, in_features), out_features, torch.float64))
    check(*make_call((rows, in_features), out_features, torch.bfloat16))


def test_takes_strided_and_expanded_inputs():
    layer, x = make_call((4, 6, 32), 24, torch.float32)
    check(layer, x.transpose(0, 1).contiguous().transpose(0, 1))
    check(layer, x[:, :, :1].expand_as(x))


def test_an_empty_batch_gives_an_empty_result():
    layer, x = make_call((0, 6, 32), 24, torch.float32)
    assert layer(x).shape == (0, 6, 24)


@pytest.mark.parametrize("training", [True, False])
def test_follows_a_weight_that_changes(training):
    layer, x = make_call((5, 32), 24, torch.float32)
    layer.train(training)
    before = layer(x)
    layer.weight.mul_(2)
    layer.bias.mul_(2)
    torch.testing.assert_close(layer(x), 2 * before)
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    torch.testing.assert_close(layer(x), layer.bias.expand(5, 24))


def test_autocast_computes_in_bfloat16():
    layer, x = make_call((5, 32), 24, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    assert out.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(out, plain, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("bias", [True, False])
def test_registration_passes_pytorchs_own_checks(bias):
    layer, x = make_call((3, 8), 5, torch.float32, bias)
    torch.library.opcheck(torch.ops.ceit.linear, (x, layer.weight, layer.bias, True, None, "native"))


def test_a_gradient_is_left_to_plain_pytorch_and_never_lost():
    layer, x = make_call((3, 4), 5, torch.float64)
    x.requires_grad_()
    with pytest.raises(BackendError, match="linear has no native implementation of training"):
        layer(x)
    with use_backend("auto"):
        assert torch.autograd.gradcheck(layer, x)
    out = torch.ops.ceit.linear(x, layer.weight, layer.bias, False, None, "native")
    with pytest.raises(RuntimeError, match="ceit::linear has no gradient"):
        out.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_compiles_and_exports_without_a_break(training):
    layer, x = make_call((3, 8), 5, torch.float32)
    layer.train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_fuses_over_the_same_state():
    plain = nn.Linear(8, 5)
    fused = FusedLinear.from_plain(plain)
    assert fused.weight is plain.weight
    assert list(fused.state_dict()) == list(plain.state_dict())


BAD_CALLS = {
    "width": (lambda layer: layer(torch.zeros(2, 7)), ValueError, r"x: expected shape \(2, 8\), got \(2, 7\)"),
    "dtype": (lambda layer: layer(torch.zeros(2, 8).double()), TypeError, "x: expected torch.float32 like weight"),
    "backend": (
        lambda layer: torch.ops.ceit.linear(torch.zeros(2, 8), layer.weight, None, False, None, "triton"),
        BackendError,
        "linear has no triton implementation",
    ),
    "weight": (
        lambda layer: torch.ops.ceit.linear(torch.zeros(2, 9), layer.weight, None, False, None, "native"),
        ValueError,
        r"weight: expected shape \(N, 9\), got \(5, 8\)",
    ),
    "bias": (
        lambda layer: torch.ops.ceit.linear(torch.zeros(2, 8), layer.weight, torch.zeros(4), False, None, "native"),
        ValueError,
        r"bias: expected shape \(5\), got \(4,\)",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_argument_is_named_with_what_was_given_and_expected(call, error, message):
    with pytest.raises(error, match=message):
        call(FusedLinear(8, 5).requires_grad_(False))
