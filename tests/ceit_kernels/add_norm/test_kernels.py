"""The Triton kernels against plain PyTorch: values, gradients, and what surrounds a call."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import add_norm, instances
from support.add_norm import EPS, SHAPES, make_inputs, run
from support.where import ANY_SIZE_DTYPES, DTYPES, INTERPRETING, UNDER_TTSEM

from ceit_kernels import add_layer_norm, use_backend

pytestmark = pytest.mark.kernels

check, check_over_draws, check_to_rounding = (
    partial(function, "triton") for function in (add_norm.check, add_norm.check_over_draws, add_norm.check_to_rounding)
)


@pytest.mark.parametrize(("branch", "prefix"), [(True, None), (False, 1), (False, -1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_plain_pytorch(poisoned_memory, shape, dtype, branch, prefix):
    def draw_call(draw):
        inputs, grads = make_inputs(shape, dtype, branch, seed=draw)
        return inputs, [*grads[:2], grads[2][:, :1]]

    check_over_draws(draw_call, prefix)


@pytest.mark.kernels(ttsem=False)
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("prefix", [None, 2, -2])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] > 1], ids=str)
def test_agrees_to_rounding_in_float64(poisoned_memory, shape, prefix, branch):
    check_to_rounding(*make_inputs(shape, torch.float64, branch), prefix)


@settings(max_examples=4 if UNDER_TTSEM else 12, deadline=None)
@given(
    batch=st.integers(1, 6),
    tokens=st.integers(1, 40),
    channels=st.integers(1, 300),
    dtype=st.sampled_from(ANY_SIZE_DTYPES),
    branch=st.booleans(),
    affine=st.booleans(),
    prefix=st.sampled_from([None, 1, -1]),
)
def test_agrees_at_any_size(batch, tokens, channels, dtype, branch, affine, prefix):
    inputs, grads = make_inputs((batch, tokens, channels), dtype, branch, affine)
    agrees = check_to_rounding if dtype == torch.float64 else check
    agrees(inputs, [*grads[:2], grads[2][:, :1]], prefix)


@pytest.mark.parametrize("channels", [2049, 4096])
def test_takes_as_many_channels_as_promised(poisoned_memory, channels):
    inputs, grads = make_inputs((1, 3, channels), torch.float32)
    check(inputs, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_program_instance_sums_several_blocks_of_rows(poisoned_memory, monkeypatch, dtype):
    monkeypatch.setattr("ceit_kernels.add_norm.triton.launch._PARTS", 3)
    inputs, grads = make_inputs((3, 37, 192), dtype)
    check(inputs, grads)


@pytest.mark.parametrize("branch", [True, False])
def test_a_mean_of_ten_thousand_deviations_costs_no_more_accuracy_than_in_plain_pytorch(branch):
    check(*make_inputs((3, 5, 384), torch.float32, branch, mean=1e4))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_takes_any_number_of_dimensions(rank):
    (x, branch, weight, bias), grads = make_inputs((2, 6, 32), torch.float32)
    shape = {1: (32,), 2: (6, 32), 4: (2, 2, 3, 32)}[rank]
    x, branch, *grads = (t.reshape(-1)[: torch.Size(shape).numel()].view(shape) for t in (x, branch, *grads[:2]))
    check([x, branch, weight, bias], grads)


def test_takes_strided_and_expanded_inputs_and_gradients():
    (x, branch, weight, bias), grads = make_inputs((4, 6, 32), torch.float32)
    strided = [x[:1, :, :16].repeat(1, 1, 2).expand(4, 6, 32), branch.transpose(0, 1).contiguous().transpose(0, 1)]
    parameters = [weight.repeat_interleave(2)[::2], bias[:1].expand(32)]
    grads = [grads[0][:1].expand(4, 6, 32), grads[1][:, :, :1].expand(4, 6, 32), grads[2][:, :1].expand(4, 2, 32)]
    check(strided + parameters, grads, prefix=2)
    check([strided[0], None, *parameters], grads, prefix=2)
    grads[2] = torch.randn(4, 5, 32)[:, 1:3]  # is read where it lies
    check([strided[0], None, *parameters], grads, prefix=2)


@pytest.mark.parametrize("shape", [(0, 6, 32), (3, 0, 32)], ids=str)
@pytest.mark.parametrize("branch", [True, False])
def test_no_rows_give_empty_results_and_zero_parameter_gradients(shape, branch):
    inputs, grads = make_inputs(shape, torch.float32, branch)
    total, out, *gradients = run("triton", inputs, grads)
    assert total.shape == out.shape == gradients[0].shape == shape
    assert not gradients[-1].any()
    assert not gradients[-2].any()


def test_two_runs_give_the_same_bits():
    inputs, grads = make_inputs((3, 197, 64), torch.float32)
    first, second = (run("triton", inputs, grads, 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_any_order_of_program_instances_gives_the_same_bits_again_and_again(monkeypatch):
    monkeypatch.setattr("ceit_kernels.add_norm.triton.launch._GROUP", 2)
    inputs, grads = make_inputs((1, 37, 192), torch.float32)
    expected = run("triton", inputs, grads, 2)
    instances.shuffle(monkeypatch, 0)
    found = run("triton", inputs, grads, 2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    leaves = [t.detach().requires_grad_() for t in inputs]
    with use_backend("add_norm=triton"):
        total, out = add_layer_norm(*leaves, EPS)
    first, second = (torch.autograd.grad((total, out), leaves, grads[:2], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_gradients_are_the_same_bits_a_thousand_times_on_two_streams():
    inputs, grads = make_inputs((64, 197, 384), torch.bfloat16)
    expected = run("triton", inputs, grads, 2)[3:]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(500):
        torch.cuda.synchronize()
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run("triton", inputs, grads, 2)[3:])
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for each in found for a, b in zip(each, expected, strict=True))


@pytest.mark.parametrize("branch", [True, False])
def test_a_prefix_is_a_part_of_the_sum(branch):
    inputs, grads = make_inputs((3, 7, 64), torch.float32, branch)
    total, _, prefix = run("triton", inputs, grads, 2)[:3]
    assert torch.equal(prefix, total[:, :2])
    assert torch.equal(run("triton", inputs, grads, -2)[2], total[:, 5:])
    with use_backend("add_norm=triton"):
        assert add_layer_norm(*inputs, EPS, num_prefix_tokens=0)[2].shape == (3, 0, 64)


@pytest.mark.parametrize("leaves", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)], ids=str)
def test_frozen_inputs_get_no_gradient_and_the_others_the_same(leaves):
    inputs, grads = make_inputs((3, 5, 48), torch.float32)
    expected = run("triton", inputs, grads)[2:]
    tensors = [t.detach().requires_grad_(i in leaves) for i, t in enumerate(inputs)]
    with use_backend("add_norm=triton"):
        results = add_layer_norm(*tensors, EPS)
    used = [(t, g) for t, g in zip(results, grads, strict=False) if t.requires_grad]
    torch.autograd.backward([t for t, _ in used], [g for _, g in used])
    for i, (tensor, want) in enumerate(zip(tensors, expected, strict=True)):
        if i in leaves:
            assert torch.equal(tensor.grad, want)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("prefix", [2, -2])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_results_that_nothing_uses_need_no_gradient(used, prefix, branch):
    inputs, grads = make_inputs((3, 5, 48), torch.float32, branch)
    gradients = {}
    for backend in ("triton", "reference"):
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        with use_backend(f"add_norm={backend}"):
            results = add_layer_norm(*leaves, EPS, num_prefix_tokens=prefix)
        torch.autograd.backward([results[i] for i in used], [grads[i] for i in used])
        gradients[backend] = [None if t is None else t.grad for t in leaves]
    for ours, theirs in zip(gradients["triton"], gradients["reference"], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, *([] if INTERPRETING else [torch.bfloat16])], ids=str)
@pytest.mark.parametrize("wide", ["x", "branch"])
def test_a_sum_of_two_dtypes_is_of_the_wider_and_each_gets_a_gradient_of_its_own(dtype, wide):
    inputs, grads = make_inputs((3, 5, 48), torch.float32)
    inputs[wide == "x"] = inputs[wide == "x"].to(dtype)
    check(inputs, grads)


@pytest.mark.skipif(INTERPRETING, reason="autocast on a CPU leaves layer_norm alone")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_on_a_gpu_normalises_in_float32(dtype):
    inputs, _ = make_inputs((3, 5, 48), torch.float32)
    inputs[:2] = (t.to(dtype) for t in inputs[:2])
    with torch.autocast("cuda", dtype), use_backend("add_norm=triton"):
        total, out = add_layer_norm(*inputs, EPS)
    assert (total.dtype, out.dtype) == (dtype, torch.float32)
    expected = torch.nn.functional.layer_norm((inputs[0] + inputs[1]).float(), (48,), *inputs[2:], EPS)
    torch.testing.assert_close(out, expected)
