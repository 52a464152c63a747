"""The stem on the CPU against plain PyTorch: values and gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import assert_as_accurate, assert_as_accurate_over_draws
from support.processors import LESSER, run_with
from support.stems import GAMMAS, NAMES, STATISTICS, compare_stem, make_stem, pooled_like, run_stem

from ceit_kernels import fuse, use_backend
from ceit_kernels.i2t.module import Image2Tokens

SIZES = [(7, 7), (3, 2), (33, 17), (61, 97)]
DRAWS = 12


@pytest.fixture(autouse=True)
def host_code():
    """Here the code for the CPU is meant."""
    with use_backend("i2t=native"):
        yield


def make_call(dtype, size, channels=(3, 64), batch=2, training=True, gamma="mixed", draw=0):
    torch.manual_seed(draw)
    stem = make_stem(*channels, gamma=gamma, training=training).cpu().to(dtype)
    x = torch.randn(batch, channels[0], *size, dtype=torch.float64).to(dtype)
    return stem, x, pooled_like(x, channels[1])


def check(make):
    """By the error rule over draws that ``make`` gives; in float64 to rounding."""
    call = make(0)
    if call[1].dtype == torch.float64:
        (fused, norm), (plain, plain_norm) = (run_stem(*call, backend) for backend in ("native", "reference"))
        for name, ours, theirs in zip(NAMES, fused, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(norm.state_dict(), plain_norm.state_dict(), rtol=1e-12, atol=1e-12)
    else:
        assert_as_accurate_over_draws((*NAMES, *STATISTICS), (compare_stem(*make(draw)) for draw in range(DRAWS)))


def draws_of(*call, **options):
    return lambda draw: make_call(*call, **options, draw=draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_agrees_with_plain_pytorch(poisoned_memory, training, size, dtype):
    check(draws_of(dtype, size, training=training))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_of_two_values_are_as_accurate(poisoned_memory, dtype):
    check(draws_of(dtype, (2, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_agrees_at_224(poisoned_memory, batch, dtype):
    check(draws_of(dtype, (224, 224), batch=batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 5])
def test_inference_agrees_with_plain_pytorch(poisoned_memory, batch, dtype):
    stem, x, _ = make_call(dtype, (97, 64), batch=batch, training=False)
    with torch.no_grad():
        fused = stem(x)
        with use_backend("i2t=reference"):
            plain, exact = stem(x), copy.deepcopy(stem).double()(x.double())
    if dtype == torch.float64:  # of which nothing is more exact
        torch.testing.assert_close(fused, exact, rtol=1e-12, atol=1e-12)
    else:
        assert_as_accurate(["out"], [fused], [plain], [exact])
    assert fused.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), batch=st.integers(1, 3), in_chans=st.integers(1, 6),
    out_chans=st.integers(1, 70), training=st.booleans(),
)  # fmt: skip
def test_agrees_at_any_size(height, width, batch, in_chans, out_chans, training):
    if batch * ((height + 1) // 2) * ((width + 1) // 2) == 1:
        training = False
    check(draws_of(torch.float64, (height, width), (in_chans, out_chans), batch, training))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_for_every_sign_of_gamma(dtype, training, gamma):
    check(draws_of(dtype, (19, 22), gamma=gamma, training=training))


@pytest.mark.parametrize("ratio", [1e-6, 1e6])
def test_gradients_need_no_division_by_gamma(ratio):
    def make(draw):
        stem, x, grad_out = make_call(torch.float32, (30, 31), gamma="positive", draw=draw)
        with torch.no_grad():
            stem.bn.weight.mul_(min(ratio, 1.0))
            stem.bn.bias.mul_(1 / max(ratio, 1.0))
        return stem, x, grad_out

    check(make)


@pytest.mark.parametrize("training", [True, False])
def test_indices_are_the_places_of_the_maxima(training):
    stem, x, _ = make_call(torch.float64, (15, 29), training=training)
    statistics = (None, None) if training else (stem.bn.running_mean, stem.bn.running_var)
    with torch.no_grad():
        parameters = (x, stem.conv.weight, stem.bn.weight, stem.bn.bias)
        _, indices, *_ = torch.ops.ceit.i2t(*parameters, *statistics, stem.bn.eps, True, None, None, "native")
        normalised = copy.deepcopy(stem).bn(stem.conv(x))
        _, flat = F.max_pool2d(normalised, 3, 2, 1, return_indices=True)
    rows, columns = (torch.arange(n) * 2 - 1 for n in flat.shape[2:])
    width = normalised.shape[3]
    assert torch.equal(indices.long(), (flat // width - rows[:, None]) * 3 + flat % width - columns)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [10, 11])
@pytest.mark.parametrize("training", [True, False])
def test_nan_and_infinity_stay_where_plain_pytorch_has_them(training, column, value):
    stem, x, _ = make_call(torch.float32, (40, 33), training=training)
    x[0, 1, 20, column] = value
    with torch.no_grad():
        fused = copy.deepcopy(stem)(x)
        with use_backend("i2t=reference"):
            plain = copy.deepcopy(stem)(x)
    torch.testing.assert_close(fused, plain, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "sliced", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout_of_the_image_is_read_in_place(dtype, layout):
    stem, x, grad_out = make_call(dtype, (20, 20))
    view = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "expanded": x[:, :1].expand(-1, 3, -1, -1),
        "sliced": F.pad(x, (3, 2, 1, 1))[:, :, 1:-1, 3:-2],
        "transposed": x.transpose(2, 3),
    }[layout]
    expected, _ = run_stem(stem, view.contiguous(), grad_out, "native")
    actual, _ = run_stem(stem, view, grad_out, "native")
    # The image's gradient is oneDNN's, whose roundings depend on the layout.
    torch.testing.assert_close(actual[:-1], expected[:-1], rtol=0, atol=0)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual[-1], expected[-1], rtol=tolerance, atol=tolerance)


def test_the_gradient_of_a_sum_is_expanded():
    stem, x, grad_out = make_call(torch.float64, (20, 22))
    check(lambda _: (stem, x, grad_out[:1, :1, :1, :1].expand_as(grad_out)))


@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_a_large_mean_does_not_drown_the_variance(mean):
    stem, _, _ = make_call(torch.float32, (8, 8), (1, 32), gamma="positive")
    with torch.no_grad():
        stem.conv.weight.zero_()[:, :, 3, 3] = 1.0
        x = mean + torch.randn(4, 1, 127, 128)
        tensors = (x, stem.conv.weight, stem.bn.weight, stem.bn.bias)
        _, _, found_mean, variance, _ = torch.ops.ceit.i2t(*tensors, None, None, 1e-5, True, None, None, "native")
    seen = x[:, 0, ::2, ::2].double()
    torch.testing.assert_close(found_mean.double(), seen.mean().expand(32), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), seen.var(unbiased=False).expand(32), rtol=1e-5, atol=0)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_gives_the_gradients_that_are_asked_for_and_no_others(training, needed):
    stem, x, grad_out = make_call(torch.float64, (20, 22), training=training)
    expected, _ = run_stem(stem, x, grad_out, "reference")
    leaves = [stem.conv.weight, stem.bn.weight, stem.bn.bias, x]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in needed)
    stem(x).backward(grad_out)
    for i, (leaf, gradient) in enumerate(zip(leaves, expected[1:], strict=True)):
        if i in needed:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-10, atol=1e-10)
        else:
            assert leaf.grad is None


def test_the_number_of_threads_changes_nothing():
    stem, x, grad_out = make_call(torch.float32, (61, 97), batch=3)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found, norm = run_stem(stem, x, grad_out, "native")
            results.append([*found[:-1], norm.running_mean, norm.running_var])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.prove
@pytest.mark.parametrize("kind", LESSER)
def test_code_for_lesser_processors_agrees(kind, tmp_path):
    stem, x, grad_out = make_call(torch.float32, (37, 42), (3, 40))
    torch.save((stem, x, grad_out, run_stem(stem, x, grad_out, "native")[0]), tmp_path / "expected")
    code = """
import torch
from support.stems import run_stem
stem, x, grad_out, expected = torch.load(sys.argv[2], weights_only=False)
found, _ = run_stem(stem, x, grad_out, "native")
torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
"""
    run_with(kind, code, tmp_path / "expected")


@pytest.mark.parametrize(("out_chans", "size"), [(1, (39, 46)), (32, (33, 130))], ids=str)
def test_a_mean_near_zero_keeps_its_digits_in_the_running_statistics(out_chans, size):
    def statistics(draw):
        torch.manual_seed(draw)
        stem, x = Image2Tokens(1, out_chans), torch.randn(1, 1, *size)
        stem.bn.momentum = 1.0
        for dtype, backend in ((torch.float32, "native"), (torch.float32, "reference"), (torch.float64, "reference")):
            module = fuse(copy.deepcopy(stem)).to(dtype)
            with use_backend(f"i2t={backend}"), torch.no_grad():
                module(x.to(dtype))
            yield [module.bn.running_mean, module.bn.running_var]

    assert_as_accurate_over_draws(("running mean", "running variance"), (tuple(statistics(draw)) for draw in range(24)))
