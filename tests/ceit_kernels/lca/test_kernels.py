"""The Triton kernels against plain PyTorch: values, gradients, and what surrounds a call."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import lca
from support.accuracy import assert_as_accurate
from support.lca import NAMES, SHAPES, make_inputs, run
from support.where import ANY_SIZE_DTYPES, DEVICE, DTYPES, INTERPRETING, UNDER_TTSEM, autocast

from ceit_kernels import lca_attention, use_backend

pytestmark = pytest.mark.kernels

check, check_over_draws, check_to_rounding = (
    partial(function, "triton") for function in (lca.check, lca.check_over_draws, lca.check_to_rounding)
)


@pytest.mark.parametrize(("bias", "dropout_p"), [(True, 0.3), (False, 0.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_plain_pytorch(poisoned_memory, shape, dtype, bias, dropout_p):
    options = {"num_heads": shape[-1], "dropout_p": dropout_p, "seed": torch.tensor([2**40 + 5], device=DEVICE)}
    check_over_draws(lambda draw: make_inputs(*shape, dtype, bias, seed=draw), **options)


@pytest.mark.kernels(ttsem=False)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_to_rounding_in_float64(poisoned_memory, shape):
    seed = torch.tensor([7], device=DEVICE)
    check_to_rounding(*make_inputs(*shape, torch.float64), num_heads=shape[-1], dropout_p=0.3, seed=seed, scale=0.3)


@settings(max_examples=4 if UNDER_TTSEM else 6, deadline=None)
@given(
    batch=st.integers(1, 20),
    layers=st.integers(1, 40),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 20),
    dtype=st.sampled_from(ANY_SIZE_DTYPES),
)
def test_agrees_at_any_size(batch, layers, heads, head_dim, dtype):
    agrees = check_to_rounding if dtype == torch.float64 else check
    agrees(*make_inputs(batch, layers, heads * head_dim, heads, dtype), num_heads=heads)


@pytest.mark.parametrize(("layers", "channels", "heads"), [(128, 32, 2), (3, 256, 1)])
def test_takes_as_many_layers_and_as_wide_heads_as_promised(poisoned_memory, layers, channels, heads):
    check_over_draws(lambda draw: make_inputs(2, layers, channels, heads, torch.float32, seed=draw), num_heads=heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_means_cost_no_more_accuracy_than_in_plain_pytorch(dtype):
    check_over_draws(lambda draw: make_inputs(3, 6, 32, 2, dtype, mean=100.0, seed=draw), num_heads=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_beyond_the_range_of_exp_do_not_overflow(dtype):
    check_over_draws(lambda draw: make_inputs(3, 6, 32, 2, dtype, seed=draw), num_heads=2, scale=100.0)


def test_takes_strided_and_expanded_inputs_and_gradients():
    (x, weight, bias), grad_out = make_inputs(4, 6, 32, 2, torch.float32)
    inputs = [x[:1, :, :16].repeat(1, 1, 2).expand(4, 6, 32), weight.t().contiguous().t(), bias[:1].expand(96)]
    check(inputs, grad_out[:1].expand(4, 1, 32), num_heads=2)
    check([x.transpose(0, 1).contiguous().transpose(0, 1), weight, bias], grad_out, num_heads=2)


def test_an_empty_batch_gives_empty_results_and_zero_weight_gradients():
    inputs, grad_out = make_inputs(0, 6, 32, 2, torch.float32)
    out, grad_x, grad_weight, grad_bias = run("triton", inputs, grad_out, num_heads=2)
    assert out.shape == (0, 1, 32)
    assert grad_x.shape == (0, 6, 32)
    assert not grad_weight.any()
    assert not grad_bias.any()


def test_two_runs_give_the_same_bits():
    inputs, grad_out = make_inputs(37, 12, 48, 3, torch.float32)
    first, second = (run("triton", inputs, grad_out, num_heads=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_key_bias_gets_a_gradient_of_exactly_zero():
    inputs, grad_out = make_inputs(5, 6, 32, 2, torch.float32)
    grad_bias = run("triton", inputs, grad_out, num_heads=2)[3]
    assert not grad_bias[32:64].any()
    assert grad_bias[:32].all()
    assert grad_bias[64:].all()


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_frozen_inputs_get_no_gradient_and_the_others_the_same(needed):
    inputs, grad_out = make_inputs(5, 6, 32, 2, torch.float32)
    expected = run("triton", inputs, grad_out, num_heads=2)[1:]
    leaves = [t.detach().requires_grad_(flag) for t, flag in zip(inputs, needed, strict=True)]
    with use_backend("lca=triton"):
        lca_attention(*leaves, num_heads=2).backward(grad_out)
    for leaf, flag, want in zip(leaves, needed, expected, strict=True):
        assert torch.equal(leaf.grad, want) if flag else leaf.grad is None


def test_a_seed_replays_its_dropout_and_another_does_not():
    inputs, grad_out = make_inputs(5, 12, 32, 2, torch.float32)
    first, again, other = (
        run("triton", inputs, grad_out, num_heads=2, dropout_p=0.5, seed=torch.tensor([seed], device=DEVICE))
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_without_a_seed_dropout_follows_pytorchs_generator():
    inputs, grad_out = make_inputs(5, 12, 32, 2, torch.float32)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(run("triton", inputs, grad_out, num_heads=2, dropout_p=0.5)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float16, *([] if INTERPRETING else [torch.bfloat16])], ids=str)
def test_autocast_rounds_as_plain_pytorch_and_keeps_the_gradients_dtypes(dtype):
    inputs, grad_out = make_inputs(5, 12, 48, 3, torch.float32)
    grad_out = grad_out.to(dtype)
    wide = run("reference", [t.double() for t in inputs], grad_out.double(), num_heads=3)
    with autocast(dtype):
        fused = run("triton", inputs, grad_out, num_heads=3)
        plain = run("reference", inputs, grad_out, num_heads=3)
    assert fused[0].dtype == dtype
    assert all(grad.dtype == torch.float32 for grad in fused[1:])
    # Plain PyTorch rounds the gradients on their way to float32, so compare at the rounding of the products.
    rounded = [[t.to(dtype) for t in results] for results in (fused, plain)]
    assert_as_accurate(NAMES, *rounded, wide)
