"""The training kernels against plain PyTorch: values, gradients, and what surrounds a call."""

import copy
import itertools
from functools import partial

import pytest
import support.leff
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import instances
from support.accuracy import assert_as_accurate
from support.leff import (
    TRAINING_CASES,
    make_call,
    make_tokens,
    make_training_leff,
    pass_through_with_means,
    run,
    train_step,
)
from support.where import DEVICE, DTYPES, INTERPRETING, UNDER_TTSEM
from torch import nn

from ceit_kernels.common.launch import record_launches
from ceit_kernels.common.tuning import Tiles
from ceit_kernels.leff.triton import launch_backward, launch_forward

pytestmark = pytest.mark.kernels(ttsem=False)

# Few and small under ttsem, which takes a minute where the interpreter takes seconds.
TTSEM_CASES = [((2, 2, 3, 1, 16, 24, 16, 3), "bbb"), ((2, 2, 2, 0, 8, 16, 20, 5), "nfn")]
# In float32 few, as it goes the way of float64, in which all agree to rounding.
CASES = [(*case, dtype) for dtype in DTYPES for case in TRAINING_CASES[: 2 if dtype == torch.float32 else None]]
if UNDER_TTSEM:
    CASES = [(*case, torch.bfloat16) for case in TTSEM_CASES]
# Wider than one program instance of the depthwise kernels.
WIDE = ((2, 9, 17, 0, 8, 16, 8, 3), "fff")


check = partial(support.leff.check, "triton", most=8)
check_to_rounding = partial(support.leff.check_to_rounding, "triton")


@pytest.mark.kernels
@pytest.mark.parametrize(("case", "norms", "dtype"), CASES, ids=str)
def test_agrees_with_plain_pytorch(poisoned_memory, case, norms, dtype):
    check(lambda draw: make_call(case, dtype, norms, draw))


@pytest.mark.parametrize(("case", "norms"), [*TRAINING_CASES, WIDE], ids=str)
def test_agrees_to_rounding_in_float64(poisoned_memory, case, norms):
    check_to_rounding(*make_call(case, torch.float64, norms))


def test_what_many_program_instances_leave_behind_is_merged(poisoned_memory, monkeypatch):
    """Several tiles of tokens, ranges of a weight gradient's tokens and images of a program instance, in both ways to
    the first layer's gradients: so many that the merging kernels take several steps.
    """
    monkeypatch.setattr(launch_forward, "_PROGRAMS", 4)
    monkeypatch.setattr(launch_backward, "ROWS", 32)
    sizes = {"TILE_T": 2, "TILE_E": 16, "TILE_S": 2, "TILE_N": 64}
    for module in (launch_forward, launch_backward):
        monkeypatch.setattr(module, "PARTS", Tiles(sizes, num_warps=4))
    call = make_call((5, 5, 6, 1, 20, 36, 20, 3), torch.float64)
    check_to_rounding(*call)
    monkeypatch.setattr(launch_backward, "_is_factored", lambda dtype: True)
    check_to_rounding(*call)


@pytest.mark.kernels
def test_whichever_program_instance_is_the_last_makes_the_same_bits_and_leaves_counters_at_zero(
    poisoned_memory, monkeypatch
):
    monkeypatch.setattr(launch_backward, "_is_factored", lambda dtype: True)
    for name in ("expand_tiles", "contract_tiles"):  # of the tokens several tiles
        monkeypatch.setattr(launch_forward, name, fewest_rows(getattr(launch_forward, name)))
    tickets = torch.zeros(99, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(launch_forward, "counters", lambda count, device, eager: tickets[:count])
    call = make_call((5, 1, 9, 1, 4, 40, 4, 3), torch.float64)
    expected = train_step("triton", copy.deepcopy(call[0]), *call[1:])
    instances.shuffle(monkeypatch, 0)
    found = train_step("triton", copy.deepcopy(call[0]), *call[1:])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not tickets.any()


def fewest_rows(tiles_of):
    def tiles(*arguments):
        tiles = tiles_of(*arguments)
        return tiles._replace(sizes=tiles.sizes | {"TILE_M": 16})

    return tiles


def test_tiles_of_another_table_that_have_more_program_instances_than_tickets_launch_twice(monkeypatch):
    monkeypatch.setattr(launch_forward, "_tickets", lambda call: 3)
    check_to_rounding(*make_call((5, 1, 2, 1, 4, 40, 4, 3), torch.float64))


@pytest.mark.parametrize("backend", ["triton", "library"])
def test_where_no_program_instance_can_know_that_it_is_the_last_launches_follow(poisoned_memory, monkeypatch, backend):
    for module in (launch_forward, launch_backward):
        monkeypatch.setattr(module, "one_publishes_for_all", lambda: False)
    monkeypatch.setattr(launch_backward, "_is_factored", lambda dtype: True)
    call = make_call((3, 3, 4, 1, 20, 36, 20, 3), torch.float64)
    support.leff.check_to_rounding(backend, *call)


@pytest.mark.parametrize("norms", ["bff", "fbn", "nfb"])
def test_norms_of_each_kind_go_together(norms):
    check_to_rounding(*make_call((2, 2, 2, 1, 8, 16, 8, 3), torch.float64, norms))


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Identity, lambda: nn.GELU("tanh")])
def test_other_activations(activation):
    check_to_rounding(*make_call((2, 2, 3, 1, 8, 16, 8, 3), torch.float64, act_layer=activation))


def test_derivatives_jump_where_plain_pytorchs_do():
    support.leff.check_kinks("triton", [-3.0, 0.0, 3.0, 6.0, -0.0, 5.0])


@settings(max_examples=5, deadline=None)
@given(
    batch=st.just(2),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    prefix=st.integers(0, 2),
    channels=st.integers(1, 18),
    hidden=st.integers(1, 18),
    norms=st.sampled_from(["".join(modes) for modes in itertools.product("bfn", repeat=3)]),
)
def test_agrees_at_any_size(batch, grid, prefix, channels, hidden, norms):
    check_to_rounding(*make_call((batch, *grid, prefix, channels, hidden, channels, 3), torch.float64, norms))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_norms_first_activation_prefix_and_biases(dtype):
    check(lambda draw: make_call((2, 3, 3, 0, 8, 24, 8, 3), dtype, "nnn", draw, first_act=False, bias=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_residual_gets_the_gradient_of_the_result_in_its_own_type(dtype):
    def make(draw):
        leff, x, grad_out, grid_size = make_call((2, 2, 2, 1, 8, 16, 8, 3), torch.float16, draw=draw)
        return leff, x, grad_out.to(dtype), grid_size, make_tokens(*x.shape, dtype, seed=draw + 100)

    for draw, fused in enumerate(check(make)):
        assert torch.equal(fused["residual.grad"], make(draw)[2])


def test_statistics_survive_a_mean_of_ten_thousand_deviations():
    leff, x, grad_out, grid_size = make_call((2, 4, 4, 1, 16, 16, 16, 3), torch.float32)
    pass_through_with_means(leff, 1e4)
    exact = train_step("reference", copy.deepcopy(leff).double(), x.double(), grad_out.double(), grid_size)
    fused = train_step("triton", leff, x, grad_out, grid_size)
    # A float32 at 1e4 is 1e-3 away from the next, which limits everything; the mean of squares would be off by 6.
    for name in ("bn1.running_var", "bn2.running_var", "bn3.running_var"):
        torch.testing.assert_close(fused[name].double(), exact[name], rtol=2e-2, atol=0)
    torch.testing.assert_close(fused["out"].double(), exact["out"], rtol=0, atol=3e-2)
    torch.testing.assert_close(fused["x.grad"].double(), exact["x.grad"], rtol=0, atol=3e-2)


def test_takes_strided_and_expanded_inputs_gradients_and_parameters():
    leff, x, grad_out, grid_size = make_call((3, 2, 2, 1, 8, 16, 8, 3), torch.float64)
    check_to_rounding(leff, x[:1].expand(3, 5, 8), grad_out[:1, :1, :1].expand(3, 5, 8), grid_size)
    leff.conv1.weight = nn.Parameter(leff.conv1.weight.detach().transpose(0, 1).contiguous().transpose(0, 1))
    leff.conv3.bias = nn.Parameter(make_tokens(1, 1, 16, torch.float64)[0, 0, ::2])
    leff.bn2.weight = nn.Parameter(make_tokens(1, 1, 1, torch.float64)[0, 0].expand(16))
    x, grad_out = (make_tokens(5, 3, 8, torch.float64, seed=seed).transpose(0, 1) for seed in (2, 3))
    check_to_rounding(leff, x, grad_out, grid_size)


def test_an_empty_batch_gives_zero_gradients_and_leaves_the_statistics():
    leff, x, grad_out, grid_size = make_call((2, 2, 2, 1, 8, 16, 8, 3), torch.float32)
    plain = train_step("reference", copy.deepcopy(leff), x[:0], grad_out[:0], grid_size)
    fused = train_step("triton", leff, x[:0], grad_out[:0], grid_size)
    torch.testing.assert_close(fused, plain, rtol=0, atol=0)


def test_running_statistics_of_any_kind_follow_plain_pytorch():
    """One launch averages them; averages over all batches, strided buffers and a norm in two layers take PyTorch."""
    leff, x, grad_out, grid_size = make_call((2, 3, 3, 1, 8, 20, 8, 3), torch.float64)
    leff.bn1.momentum = None
    check_to_rounding(leff, x, grad_out, grid_size)
    leff.bn1.momentum = 1.0
    leff.bn2.register_buffer("running_mean", x.new_zeros(20, 2)[:, 0])
    check_to_rounding(leff, x, grad_out, grid_size)
    leff.bn2 = leff.bn1
    check_to_rounding(leff, x, grad_out, grid_size)


def test_autograd_sees_of_running_statistics_the_counters_alone_as_in_plain_pytorch():
    leff, x, _, grid_size = make_call((2, 2, 2, 1, 8, 16, 8, 3), torch.float32)
    before = [buffer._version for buffer in leff.buffers()]
    run("triton", leff, x, grid_size)
    counted = [name.endswith("num_batches_tracked") for name, _ in leff.named_buffers()]
    assert [buffer._version for buffer in leff.buffers()] == [v + c for v, c in zip(before, counted, strict=True)]


def test_one_value_to_take_statistics_of_is_an_error_before_anything_is_launched():
    leff, x, _, _ = make_call((1, 1, 1, 1, 8, 16, 8, 3), torch.float32)
    messages = []
    for backend in ("reference", "triton"):
        with record_launches() as launches, pytest.raises(ValueError, match="Expected more than 1 value") as error:
            run(backend, leff, x)
        messages.append(str(error.value))
        assert not launches
    assert messages[0] == messages[1]


def test_two_runs_give_the_same_bits():
    leff, *inputs = make_call((2, 3, 4, 1, 8, 24, 8, 3), torch.float32)
    first, second = (train_step("triton", copy.deepcopy(leff), *inputs) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("trained", "norms"),
    [("conv1.weight", "bbb"), ("conv2.weight", "bbb"), ("bn2.weight", "bbb"), ("conv3.bias", "fff"), ("conv1", "nnn")],
)
def test_a_part_that_trains_alone_gets_the_gradients_that_it_gets_among_others(trained, norms):
    leff, x, grad_out, grid_size = make_call((2, 2, 2, 1, 8, 16, 8, 3), torch.float32, norms)
    expected = train_step("triton", copy.deepcopy(leff), x, grad_out, grid_size)
    for name, parameter in leff.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    run("triton", leff, x, grid_size).backward(grad_out)
    for name, parameter in leff.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[f"{name}.grad"])
        else:
            assert parameter.grad is None


SUMS, SPREAD, HIDDEN = "norm_sums", "norm_gradient", "hidden_gradient"
DEPTHWISE, INPUT, WEIGHT = "depthwise_backward", "contract_operand", "weight_gradient"


@pytest.mark.parametrize(
    ("trained", "launched"),
    {
        ("x", "conv", "bn"): [SUMS, SPREAD, WEIGHT, HIDDEN, DEPTHWISE, INPUT, WEIGHT],
        ("conv", "bn"): [SUMS, SPREAD, WEIGHT, HIDDEN, DEPTHWISE, WEIGHT],
        ("x",): [SUMS, SPREAD, HIDDEN, DEPTHWISE, INPUT],
        ("conv2", "conv3"): [SUMS, SPREAD, WEIGHT, HIDDEN, DEPTHWISE],
        ("bn2",): [SUMS, SPREAD, HIDDEN],
        ("conv3",): [SUMS, SPREAD, WEIGHT],
        ("bn3",): [SUMS],
        ("residual",): [],
    }.items(),
    ids=str,
)
def test_what_is_frozen_costs_no_pass_over_the_tokens(trained, launched):
    leff, x, grad_out, grid_size = make_call((2, 2, 2, 1, 8, 16, 8, 3), torch.float32)
    for name, parameter in leff.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    residual = torch.zeros_like(x).requires_grad_("residual" in trained)
    with record_launches() as launches:
        out = run("triton", leff, x.requires_grad_("x" in trained), grid_size, residual)
        forward = len(launches)
        out.backward(grad_out)
    kernels = [launch.kernel.__name__.removeprefix("leff_").removesuffix("_kernel") for launch in launches[forward:]]
    assert [name for name in kernels if name != "reduce"] == launched


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, *([] if INTERPRETING else [torch.bfloat16])], ids=str)
def test_autocast_gives_plain_pytorchs_dtypes_and_accuracy(dtype, prefix):
    leff, x, grad_out, grid_size = make_call((2, 3, 3, prefix, 16, 24, 16, 3), torch.float32)
    exact = train_step("reference", copy.deepcopy(leff).double(), x.double(), grad_out.double(), grid_size)
    with torch.autocast(DEVICE, dtype):
        grad_out = grad_out if prefix else grad_out.to(dtype)
        fused, plain = (
            train_step(backend, copy.deepcopy(leff), x, grad_out, grid_size) for backend in ("triton", "reference")
        )
    assert {name: t.dtype for name, t in fused.items()} == {name: t.dtype for name, t in plain.items()}
    # Plain PyTorch rounds gradients on their way to float32, so compare at the rounding of the GEMMs.
    names = [name for name in exact if not name.endswith("num_batches_tracked")]
    rounded = ([results[name].to(dtype) for name in names] for results in (fused, plain))
    assert_as_accurate(names, *rounded, [exact[name] for name in names])


@pytest.mark.gpu
def test_takes_tensors_beyond_two_to_the_31_bytes():
    leff = make_training_leff(64, 256, 64, 3, torch.float16)
    images = 2**31 // (2 * 256 * 28 * 28) + 8
    x = torch.randn(images, 785, 64, device=DEVICE, dtype=torch.float16)
    fused, plain = (train_step(backend, copy.deepcopy(leff), x, x, (28, 28)) for backend in ("triton", "reference"))
    for name in ("out", "x.grad", "conv1.weight.grad"):
        scale = plain[name].abs().max().item()
        torch.testing.assert_close(fused[name][-4:], plain[name][-4:], rtol=0, atol=0.02 * scale)
