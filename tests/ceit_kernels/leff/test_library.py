"""LeFF by PyTorch's GEMMs around one kernel, against plain PyTorch."""

import copy

import pytest
import torch
from support.accuracy import assert_as_accurate
from support.leff import make_leff, make_shape, make_tokens, pass_through_with_means, run
from support.where import DTYPES, UNDER_TTSEM, autocast
from torch import nn
from torch._subclasses import FakeTensorMode

from ceit_kernels.common.launch import record_launches
from ceit_kernels.leff.triton.launch_library import leff_inference_library

pytestmark = pytest.mark.kernels(ttsem=False)

# batch, height, width, prefix tokens, channels in, hidden and out, kernel size
CASES = [
    (2, 5, 4, 1, 24, 40, 24, 3),
    (1, 3, 9, 0, 16, 32, 20, 5),
    (3, 1, 1, 2, 16, 16, 16, 7),
    (1, 2, 17, 1, 8, 12, 8, 3),  # wider than a program instance
]


def check(leff, x, grid_size, residual=None):
    doubled = None if residual is None else residual.double()
    exact = run("reference", copy.deepcopy(leff).double(), x.double(), grid_size, doubled)
    fused, plain = (run(backend, leff, x, grid_size, residual) for backend in ("library", "reference"))
    assert fused.dtype == plain.dtype
    if x.dtype == torch.float64:
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    else:
        assert_as_accurate(["out"], [fused], [plain], [exact])


def make(case, dtype, **options):
    batch, height, width, prefix, channels, hidden, out, kernel_size = case
    leff = make_leff(channels, hidden, out, kernel_size, dtype, prefix, **options)
    return leff, make_tokens(batch, prefix + height * width, channels, dtype), (height, width)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES[2:] if UNDER_TTSEM else [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES[::3] if UNDER_TTSEM else CASES, ids=str)
def test_agrees_with_plain_pytorch(poisoned_memory, case, dtype):
    check(*make(case, dtype))


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_agrees_without_norms(poisoned_memory, case):
    check(*make(case, torch.float16, with_bn=False))


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Identity, lambda: nn.GELU("tanh")])
def test_other_activations(activation):
    check(*make(CASES[0], torch.float16, act_layer=activation))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    [(torch.float16, torch.float16), (torch.float16, torch.float32), (torch.float32, torch.float32)],
    ids=str,
)
def test_adds_a_residual_of_any_type(dtype, residual_dtype, prefix):
    leff, x, grid_size = make((2, 3, 3, prefix, 16, 24, 16, 3), dtype)
    check(leff, x, grid_size, make_tokens(*x.shape, residual_dtype, seed=1))


def test_takes_norms_in_float32_and_parts_that_are_missing():
    leff, x, grid_size = make(CASES[0], torch.float16)
    for norm in (leff.bn1, leff.bn2, leff.bn3):
        norm.float()
    check(leff, x, grid_size)
    leff.bn1, leff.conv2.bias, leff.conv3.bias = nn.Identity(), None, None
    check(leff, x, grid_size)
    leff.bn3 = nn.Identity()
    check(leff, x, grid_size)


def test_what_is_added_to_the_last_product_fills_many_program_instances():
    leff, x, grid_size = make((2, 5, 7, 2, 70, 8, 70, 3), torch.float32)
    check(leff, x, grid_size, make_tokens(*x.shape, torch.float32, seed=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_last_norm_and_the_prefix_take_no_launch_but_where_weights_have_no_room_for_a_scale(dtype):
    with FakeTensorMode(), record_launches() as launches:
        x, parameters, settings = make_shape("tiny", dtype, "frozen")
        leff_inference_library(x, parameters, x, settings, dtype)
        leff_inference_library(x, [None if i % 6 > 1 else p for i, p in enumerate(parameters)], x, settings, dtype)
    names = ["leff_depthwise_inference_kernel"] * 2
    if dtype == torch.float16:
        names.insert(1, "leff_norm_kernel")
    assert [launch.kernel.__name__ for launch in launches] == names


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_large_running_means_cost_no_more_accuracy_than_in_plain_pytorch(dtype):
    leff = make_leff(16, 16, 16, 3, dtype)
    pass_through_with_means(leff, 1e3)
    for norm in (leff.bn1, leff.bn2, leff.bn3):
        nn.init.constant_(norm.running_mean, 1e3)
        nn.init.ones_(norm.running_var)
    check(leff, make_tokens(2, 10, 16, dtype), (3, 3))
    nn.init.zeros_(leff.conv1.bias)  # the GEMMs make the mean
    check(leff, make_tokens(2, 10, 16, dtype, mean=1e3), (3, 3))


@pytest.mark.parametrize("prefix", [0, 1])
def test_autocast_gives_plain_pytorchs_dtype_and_accuracy(prefix):
    leff, x, grid_size = make((2, 3, 3, prefix, 16, 24, 16, 3), torch.float32)
    exact = run("reference", copy.deepcopy(leff).double(), x.double(), grid_size)
    with autocast(torch.float16):
        fused, plain = (run(backend, leff, x, grid_size) for backend in ("library", "reference"))
    assert fused.dtype == plain.dtype
    assert_as_accurate(["out"], [fused.half()], [plain.half()], [exact])


def test_an_empty_batch_gives_an_empty_result():
    leff, x, grid_size = make(CASES[0], torch.float32)
    assert run("library", leff, x[:0], grid_size).shape == x[:0].shape
