"""Attention on the CPU, without keys and values, against plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lca import SHAPES, check_over_draws, check_to_rounding, make_inputs, run
from torch.utils.flop_counter import FlopCounterMode

from ceit_kernels import FusedLCAAttention, lca_attention, use_backend


@pytest.fixture(autouse=True)
def on_the_cpu():
    with use_backend("lca=native"):
        yield


def make(*args, **options):
    return make_inputs(*args, device="cpu", **options)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_plain_pytorch(shape, dtype, bias, dropout_p):
    options = {"num_heads": shape[-1], "dropout_p": dropout_p, "seed": torch.tensor([2**40 + 5])}
    if dtype == torch.float64:
        check_to_rounding("native", *make(*shape, dtype, bias), **options)
    else:
        check_over_draws("native", lambda draw: make(*shape, dtype, bias, seed=draw), **options)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(0, 20), layers=st.integers(1, 40), heads=st.integers(1, 3), head_dim=st.integers(1, 20))
def test_agrees_at_any_size(batch, layers, heads, head_dim):
    inputs, grad_out = make(batch, layers, heads * head_dim, heads, torch.float64)
    check_to_rounding("native", inputs, grad_out, num_heads=heads, scale=0.3)


def test_scores_beyond_the_range_of_exp_do_not_overflow():
    check_over_draws("native", lambda draw: make(3, 12, 48, 3, torch.float32, seed=draw), num_heads=3, scale=50.0)


def test_the_key_bias_gets_a_gradient_of_exactly_zero():
    inputs, grad_out = make(3, 12, 48, 3, torch.float32)
    assert not run("native", inputs, grad_out, num_heads=3)[3][48:96].any()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("registered", [True, False])
def test_gradients_are_those_of_finite_differences(registered, dropout_p):
    inputs, _ = make(2, 3, 4, 2, torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    seed = torch.tensor([5])

    def call(x, weight, bias):
        if registered:
            return torch.ops.ceit.lca(x, weight, bias, seed, 2, 0.7, dropout_p, True, None, "native")[0]
        return lca_attention(x, weight, bias, num_heads=2, scale=0.7, dropout_p=dropout_p, seed=seed)

    assert torch.autograd.gradcheck(call, leaves)


def test_a_second_derivative_is_an_error_and_the_reference_has_it():
    inputs, _ = make(2, 3, 4, 2, torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    call = lambda *args: lca_attention(*args, num_heads=2)  # noqa: E731
    (grad,) = torch.autograd.grad(call(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"lca_attention is differentiable once.*reference"):
        grad.sum().backward()
    with use_backend("lca=reference"):
        assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_registration_passes_pytorchs_own_checks(needs, bias):
    inputs, grad_out = make(2, 3, 8, 2, torch.float32, bias)
    settings = (2, 0.7, 0.0)
    _, *saved = torch.ops.ceit.lca(*inputs, None, *settings, True, None, "native")
    arguments = (grad_out, *inputs, None, *saved, *settings, None, *needs, "native")
    torch.library.opcheck(torch.ops.ceit.lca_backward, arguments)
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.ceit.lca, (*leaves, None, *settings, True, None, "native"))


def test_autocast_computes_in_bfloat16_and_keeps_the_gradients_dtypes():
    inputs, grad_out = make(3, 12, 48, 3, torch.float32)
    options = {"num_heads": 3, "dropout_p": 0.3, "seed": torch.tensor([5])}
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (run(name, inputs, grad_out.bfloat16(), **options) for name in ("native", "reference"))
    assert [t.dtype for t in ours] == [torch.bfloat16, *[torch.float32] * 3]
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1)


def test_takes_a_sixth_of_the_multiply_adds_at_twelve_layers():
    module, x = FusedLCAAttention(192, 3), torch.randn(16, 12, 192)
    counts = []
    for backend in ("native", "reference"):
        with use_backend(f"lca={backend}"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            lca_attention(x, module.qkv.weight, num_heads=3)
        counts.append(counter.get_total_flops())
    assert 6 * counts[0] < counts[1]


def test_compiles_and_exports_as_one_operator():
    module, x = FusedLCAAttention(24, 2).eval(), torch.randn(2, 5, 24)
    expected = module(x)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
    exported = torch.export.export(module, (x,))
    assert str(exported.graph).count("ceit.lca") == 1
    torch.testing.assert_close(exported.module()(x), expected)
