"""The inference kernels against plain PyTorch."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import assert_as_accurate
from support.leff import make_leff, make_tokens, pass_through_with_means, run
from support.where import ANY_SIZE_DTYPES, DTYPES, INTERPRETING, UNDER_TTSEM, autocast
from torch import nn

from ceit_kernels import leff_block, use_backend
from ceit_kernels.leff.norms import BatchNorm

pytestmark = pytest.mark.kernels

# Infinity is what saturates in the interpreter.
saturating = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")

# batch, height, width, prefix tokens, channels in, hidden and out, kernel size
CASES = [
    (2, 5, 4, 1, 24, 40, 24, 3),
    (1, 3, 3, 0, 16, 32, 20, 5),
    (3, 1, 1, 2, 16, 16, 16, 7),
    (1, 7, 9, 1, 48, 70, 48, 3),
    (1, 2, 3, 0, 8, 24, 200, 3),
]


def check(leff, x, grid_size):
    exact = run("reference", copy.deepcopy(leff).double(), x.double(), grid_size)
    fused, plain = (run(backend, leff, x, grid_size) for backend in ("triton", "reference"))
    assert_as_accurate(["out"], [fused], [plain], [exact])
    prefix = leff.num_prefix_tokens
    if prefix:
        assert torch.equal(fused[:, :prefix], x[:, :prefix])


def check_to_rounding(leff, x, grid_size):
    fused, plain = (run(backend, leff, x, grid_size) for backend in ("triton", "reference"))
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_bn", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_plain_pytorch(poisoned_memory, case, dtype, with_bn):
    batch, height, width, prefix, channels, hidden, out, kernel_size = case
    leff = make_leff(channels, hidden, out, kernel_size, dtype, prefix, with_bn=with_bn)
    check(leff, make_tokens(batch, prefix + height * width, channels, dtype), (height, width))


@pytest.mark.kernels(ttsem=False)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_to_rounding_in_float64(poisoned_memory, case):
    batch, height, width, prefix, channels, hidden, out, kernel_size = case
    leff = make_leff(channels, hidden, out, kernel_size, torch.float64, prefix)
    x = make_tokens(batch, prefix + height * width, channels, torch.float64)
    check_to_rounding(leff, x, (height, width))


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Identity, lambda: nn.GELU("tanh")])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_other_activations(activation, dtype):
    leff = make_leff(16, 24, 16, 3, dtype, act_layer=activation)
    check(leff, make_tokens(2, 10, 16, dtype), (3, 3))


@settings(max_examples=3 if UNDER_TTSEM else 12, deadline=None)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    prefix=st.integers(0, 2),
    channels=st.integers(1, 40),
    hidden=st.integers(1, 70),
    dtype=st.sampled_from(ANY_SIZE_DTYPES),
)
def test_agrees_at_any_size(batch, grid, prefix, channels, hidden, dtype):
    leff = make_leff(channels, hidden, channels, 3, dtype, prefix)
    agrees = check_to_rounding if dtype == torch.float64 else check
    agrees(leff, make_tokens(batch, prefix + grid[0] * grid[1], channels, dtype), grid)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("residual_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_module_adds_a_residual_of_any_type(dtype, residual_dtype, prefix):
    leff, x = make_leff(16, 24, 16, 3, dtype, prefix), make_tokens(2, prefix + 9, 16, dtype)
    residual = make_tokens(2, prefix + 9, 16, residual_dtype or dtype, seed=1)
    exact = run("reference", copy.deepcopy(leff).double(), x.double(), None, residual.double())
    fused, plain = (run(backend, leff, x, None, residual) for backend in ("triton", "reference"))
    assert_as_accurate(["out"], [fused], [plain], [exact])


@saturating
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_saturate_where_inputs_are_large(dtype):
    leff = make_leff(16, 24, 16, 3, dtype)
    nn.init.normal_(leff.bn1.weight, std=30.0)
    nn.init.normal_(leff.bn2.weight, std=30.0)
    check(leff, make_tokens(2, 10, 16, dtype, mean=5.0), (3, 3))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_takes_norms_in_float32_in_a_model_of_16_bits(poisoned_memory, dtype):
    leff = make_leff(16, 24, 16, 3, dtype)
    for norm in (leff.bn1, leff.bn2, leff.bn3):
        norm.float()
    check(leff, make_tokens(2, 10, 16, dtype), (3, 3))


@saturating
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_running_means_cost_no_more_accuracy_than_in_plain_pytorch(dtype):
    leff = make_leff(16, 16, 16, 3, dtype)
    pass_through_with_means(leff, 1e3)
    for norm in (leff.bn1, leff.bn2, leff.bn3):
        nn.init.constant_(norm.running_mean, 1e3)
        nn.init.ones_(norm.running_var)
    check(leff, make_tokens(2, 10, 16, dtype), (3, 3))
    nn.init.zeros_(leff.conv1.bias)  # the GEMMs make the mean
    check(leff, make_tokens(2, 10, 16, dtype, mean=1e3), (3, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_of_weight_zero_leaves_its_bias(dtype):
    leff = make_leff(16, 24, 16, 3, dtype, prefix=0)
    for norm in (leff.bn1, leff.bn2):
        norm.weight[::2] = 0.0
    check(leff, make_tokens(2, 9, 16, dtype), (3, 3))
    nn.init.zeros_(leff.bn3.weight)
    out = run("triton", leff, make_tokens(2, 9, 16, dtype), (3, 3))
    assert torch.equal(out, leff.bn3.bias.expand_as(out))


def make_layer(out_features, in_features, kernel_size, present, dtype, eps):
    """Weight, bias and norm of a convolution, each vector only if ``present`` says so."""
    with_bias, with_norm, with_norm_weight, with_norm_bias = present
    weight = make_tokens(out_features, in_features, kernel_size**2, dtype, seed=out_features)
    vectors = make_tokens(5, 1, out_features, dtype, seed=in_features).flatten(1)
    bias, norm_weight, norm_bias = (
        vector if with_it else None
        for vector, with_it in zip(vectors, (with_bias, with_norm_weight, with_norm_bias), strict=False)
    )
    norm = BatchNorm(vectors[3], vectors[4].abs() + 0.1, norm_weight, norm_bias, eps=eps) if with_norm else None
    return weight.unflatten(2, (kernel_size, kernel_size)), bias, norm


@saturating
@settings(max_examples=3 if UNDER_TTSEM else 16, deadline=None)
@given(present=st.tuples(*(st.tuples(*(st.booleans(),) * 4),) * 3), dtype=st.sampled_from(ANY_SIZE_DTYPES))
def test_any_of_biases_norms_and_their_parameters_may_be_missing(present, dtype):
    sizes = ((20, 12, 1, 1e-5), (20, 1, 3, 1e-2), (12, 20, 1, 1.0))
    layers = [make_layer(*size[:3], has, dtype, size[3]) for size, has in zip(sizes, present, strict=True)]
    x = make_tokens(2, 13, 12, dtype)

    def call(backend, dtype):
        def to(tensor):
            return tensor.to(dtype) if isinstance(tensor, torch.Tensor) else tensor

        weights, biases, norms = zip(*layers, strict=True)
        norms = [norm and BatchNorm(*map(to, norm)) for norm in norms]
        with use_backend(f"leff={backend}"):
            tensors = (to(x), [*map(to, weights)], [*map(to, biases)], norms)
            return leff_block(*tensors, grid_size=(3, 4), num_prefix_tokens=1)

    fused, plain = call("triton", dtype), call("reference", dtype)
    if dtype == torch.float64:
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    else:
        assert_as_accurate(["out"], [fused], [plain], [call("reference", torch.float64)])


def test_takes_strided_and_expanded_parameters():
    leff = make_leff(16, 16, 16, 3, torch.float32)
    leff.conv1.weight = nn.Parameter(leff.conv1.weight.transpose(0, 1), requires_grad=False)
    leff.conv2.weight = nn.Parameter(leff.conv2.weight.mT, requires_grad=False)
    leff.bn2.weight = nn.Parameter(leff.bn2.weight[:1].expand(16), requires_grad=False)
    leff.bn3.running_mean = torch.stack((leff.bn3.running_mean, leff.bn3.running_var), dim=1)[:, 0]
    check(leff, make_tokens(2, 10, 16, torch.float32), (3, 3))


def test_takes_strided_and_expanded_tokens():
    leff = make_leff(16, 24, 16, 3, torch.float32)
    x = make_tokens(10, 3, 16, torch.float32)
    check(leff, x.transpose(0, 1), (3, 3))
    check(leff, x[:1, :1].expand(2, 10, 16), (3, 3))


def test_an_empty_batch_gives_an_empty_result():
    leff = make_leff(16, 24, 16, 3, torch.float32)
    assert run("triton", leff, make_tokens(0, 10, 16, torch.float32), None).shape == (0, 10, 16)


def test_two_runs_give_the_same_bits():
    leff, x = make_leff(16, 24, 16, 3, torch.float32), make_tokens(2, 17, 16, torch.float32)
    assert torch.equal(run("triton", leff, x, None), run("triton", leff, x, None))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, *([] if INTERPRETING else [torch.bfloat16])], ids=str)
def test_autocast_gives_plain_pytorchs_dtype_and_accuracy(dtype, prefix):
    leff, x = make_leff(16, 24, 16, 3, torch.float32, prefix), make_tokens(2, prefix + 9, 16, torch.float32)
    exact = run("reference", copy.deepcopy(leff).double(), x.double(), (3, 3))
    with autocast(dtype):
        fused, plain = (run(backend, leff, x, (3, 3)) for backend in ("triton", "reference"))
    assert fused.dtype == plain.dtype
    assert_as_accurate(["out"], [fused[:, prefix:].to(dtype)], [plain[:, prefix:].to(dtype)], [exact[:, prefix:]])
    assert torch.equal(fused[:, :prefix], plain[:, :prefix])
