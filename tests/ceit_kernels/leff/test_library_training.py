"""LeFF's training by PyTorch's GEMMs and kernels that stream, against plain PyTorch."""

import copy
from functools import partial

import pytest
import support.leff
import torch
from support import instances
from support.leff import TRAINING_CASES, make_call, make_tokens, pass_through_with_means, run, train_step
from support.where import DTYPES, UNDER_TTSEM, autocast
from torch import nn

from ceit_kernels.common.tuning import Tiles
from ceit_kernels.leff.triton import launch_backward

pytestmark = pytest.mark.kernels(ttsem=False)

check = partial(support.leff.check, "library", most=8)
check_to_rounding = partial(support.leff.check_to_rounding, "library")


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES[2:] if UNDER_TTSEM else DTYPES[1:], ids=str)
def test_agrees_with_plain_pytorch(poisoned_memory, dtype):
    check(lambda draw: make_call((2, 2, 3, 1, 16, 24, 16, 3), dtype, "bbb", draw))


@pytest.mark.parametrize(
    ("case", "norms", "factored"), [*((*case, False) for case in TRAINING_CASES), (*TRAINING_CASES[0], True)], ids=str
)
def test_agrees_to_rounding_in_float64(poisoned_memory, monkeypatch, case, norms, factored):
    monkeypatch.setattr(launch_backward, "_is_factored", lambda dtype: factored)
    check_to_rounding(*make_call(case, torch.float64, norms))


def test_a_prefix_behind_a_last_layer_without_a_norm():
    check_to_rounding(*make_call((2, 2, 3, 2, 8, 20, 8, 3), torch.float64, "bbn"))


def test_what_many_program_instances_leave_behind_is_merged(poisoned_memory, monkeypatch):
    monkeypatch.setattr(launch_backward, "ROWS", 16)
    call = make_call((3, 3, 5, 1, 8, 20, 8, 3), torch.float64)
    check_to_rounding(*call)
    expected = train_step("library", copy.deepcopy(call[0]), *call[1:])
    instances.shuffle(monkeypatch, 0)
    found = train_step("library", copy.deepcopy(call[0]), *call[1:])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("pipeline", ["triton", "library"])
@pytest.mark.parametrize("sizes", [(16, 16), (32, 16), (16, 32)], ids=str)
def test_tiles_of_second_moments_that_are_not_computed_are_filled(poisoned_memory, monkeypatch, pipeline, sizes):
    """A product of x by itself is symmetric; 40 channels are several tiles of it, the last ones not whole."""
    tiles = Tiles({"TILE_M": 16, "TILE_E": sizes[0], "TILE_C": sizes[1], "NUM_C": 1}, 4, 2)
    monkeypatch.setattr(launch_backward, "weight_gradient_tiles", lambda *arguments: tiles)
    monkeypatch.setattr(launch_backward, "_is_factored", lambda dtype: True)
    support.leff.check_to_rounding(pipeline, *make_call((3, 4, 4, 1, 40, 24, 40, 3), torch.float64))


def test_a_residual_other_activations_and_missing_biases():
    leff, *inputs = make_call((2, 2, 2, 1, 8, 16, 8, 3), torch.float64, act_layer=nn.SiLU)
    leff.conv1.bias = leff.conv3.bias = None
    check_to_rounding(leff, *inputs, make_tokens(2, 5, 8, torch.float64, seed=9))


def test_statistics_survive_a_mean_of_ten_thousand_deviations():
    leff, x, grad_out, grid_size = make_call((2, 4, 4, 1, 16, 16, 16, 3), torch.float32)
    pass_through_with_means(leff, 1e4)
    exact = train_step("reference", copy.deepcopy(leff).double(), x.double(), grad_out.double(), grid_size)
    fused = train_step("library", leff, x, grad_out, grid_size)
    for name in ("bn1.running_var", "bn2.running_var", "bn3.running_var"):
        torch.testing.assert_close(fused[name].double(), exact[name], rtol=2e-2, atol=0)


@pytest.mark.parametrize("trained", ["conv1.weight", "bn2.weight", "conv3.bias"])
def test_a_part_that_trains_alone_gets_the_gradients_that_it_gets_among_others(trained):
    leff, x, grad_out, grid_size = make_call((2, 2, 2, 1, 8, 16, 8, 3), torch.float32)
    expected = train_step("library", copy.deepcopy(leff), x, grad_out, grid_size)
    for name, parameter in leff.named_parameters():
        parameter.requires_grad_(name == trained)
    run("library", leff, x, grid_size).backward(grad_out)
    assert torch.equal(leff.get_parameter(trained).grad, expected[f"{trained}.grad"])


def test_autocast_gives_plain_pytorchs_dtypes():
    leff, x, grad_out, grid_size = make_call((2, 3, 3, 1, 16, 24, 16, 3), torch.float32)
    with autocast(torch.float16):
        steps = [train_step(by, copy.deepcopy(leff), x, grad_out, grid_size) for by in ("library", "reference")]
    assert len({tuple(tensor.dtype for tensor in step.values()) for step in steps}) == 1
    for name in ("out", "x.grad", "conv1.weight.grad", "conv2.weight.grad", "conv3.weight.grad"):
        fused, plain = (step[name] for step in steps)
        assert (fused - plain).norm() <= 2e-2 * plain.norm(), name
