"""The compiled kernels against plain PyTorch: on a GPU, else unchanged on the host."""

import copy
import itertools
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_as_accurate, assert_as_accurate_over_draws
from support.stems import GAMMAS, NAMES, STATISTICS, compare_stem, make_stem, pooled_like, run_stem
from support.where import DEVICE, ON_GPU

from ceit_kernels import use_backend

pytestmark = pytest.mark.usefixtures("native")

SIZES = [(7, 7), (3, 2), (8, 30), (33, 17), (61, 97)]
EXACT = [] if ON_GPU else [torch.float64]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DRAWS = 12

# Plain PyTorch takes 20 s on the CPU for the largest size in float16.
SLOW = [] if ON_GPU else [(torch.float16, SIZES[-1])]
CASES = [case for case in itertools.product(EXACT + DTYPES, SIZES) if case not in SLOW]


def make_image(size, in_chans=3, batch=2, dtype=torch.float64):
    return torch.randn(batch, in_chans, *size, dtype=torch.float64).to(DEVICE, dtype)


def check(dtype, size, channels=(3, 32), batch=2, **options):
    """By the error rule over draws, against float64 on the same rounded values; in float64 to rounding."""

    def make(draw):
        torch.manual_seed(draw)
        stem, x = make_stem(*channels, **options).to(dtype), make_image(size, channels[0], batch, dtype)
        return stem, x, pooled_like(x, channels[1])

    if dtype == torch.float64:
        (fused, norm), (plain, plain_norm) = (run_stem(*make(0), backend) for backend in ("native", "reference"))
        for name, ours, theirs in zip(NAMES, fused, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(norm.state_dict(), plain_norm.state_dict(), rtol=1e-12, atol=1e-12)
    else:
        assert_as_accurate_over_draws((*NAMES, *STATISTICS), (compare_stem(*make(draw)) for draw in range(DRAWS)))


@contextmanager
def precision(name):
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, name
    yield
    convolutions.fp32_precision = before


@pytest.fixture
def full_precision():
    with precision("ieee"):
        yield


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "size"), CASES, ids=str)
def test_agrees_with_plain_pytorch(poisoned_memory, full_precision, dtype, size, training):
    check(dtype, size, training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [*EXACT, torch.bfloat16], ids=str)
def test_agrees_for_every_sign_of_gamma(poisoned_memory, dtype, gamma, training):
    check(dtype, (19, 22), gamma=gamma, training=training)


@pytest.mark.parametrize("channels", [(1, 32), (2, 64), (4, 96)], ids=str)
@pytest.mark.parametrize("dtype", [*EXACT, torch.float16], ids=str)
def test_agrees_for_other_channels(poisoned_memory, dtype, channels):
    check(dtype, (15, 18), channels)


@pytest.mark.parametrize("dtype", EXACT or DTYPES, ids=str)
def test_agrees_at_224(full_precision, dtype):
    check(dtype, (224, 224), (3, 64), batch=1)


@pytest.mark.parametrize("training", [True, False])
def test_the_result_agrees_at_224_in_bfloat16(training):
    torch.manual_seed(3)
    stem = make_stem(out_chans=64, training=training).bfloat16()
    x = make_image((224, 224), batch=1, dtype=torch.bfloat16)
    outs = []
    for backend, dtype in (("native", torch.bfloat16), ("reference", torch.bfloat16), ("reference", torch.float64)):
        with use_backend(f"i2t={backend}"), torch.no_grad():
            outs.append([copy.deepcopy(stem).to(dtype)(x.to(dtype))])
    assert_as_accurate(["out"], *outs)


def test_tf32_is_as_accurate_as_its_rounding():
    torch.manual_seed(4)
    stem, x = make_stem(gamma="positive").float(), make_image((33, 30), dtype=torch.float32)
    with precision("tf32"):
        fused, _ = run_stem(stem, x, grad := pooled_like(x, 32), "native")
    half, _ = run_stem(copy.deepcopy(stem).half(), x.half(), grad, "reference")
    exact, _ = run_stem(copy.deepcopy(stem).double(), x.double(), grad.double(), "reference")
    for name, ours, theirs, truth in zip(NAMES, fused, half, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 1e-3 * truth.norm(), name


@pytest.mark.parametrize(("in_chans", "size"), [(3, (17, 8)), (4, (5, 40)), (1, (30, 136))], ids=str)
@pytest.mark.parametrize("dtype", EXACT + DTYPES, ids=str)
def test_images_are_read_alike_by_16_bytes_and_by_elements(poisoned_memory, dtype, in_chans, size):
    torch.manual_seed(6)
    stem, x = make_stem(in_chans, 32).to(dtype), make_image(size, in_chans, dtype=dtype)
    places = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), F.pad(x, (0, 1))[..., :-1]
    grad = pooled_like(x, 32)
    (ours, norm), *others = (run_stem(copy.deepcopy(stem), y, grad, "native") for y in (x, *places))
    for theirs, other_norm in others:
        for name, a, b in zip(NAMES, ours, theirs, strict=True):
            assert torch.equal(a, b), name
        torch.testing.assert_close(norm.state_dict(), other_norm.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(14, 14), (15, 29)], ids=str)
def test_indices_are_the_places_of_the_maxima(full_precision, size, training):
    torch.manual_seed(5)
    dtype = torch.float32 if ON_GPU else torch.float64
    stem, x = make_stem(training=training).to(dtype), make_image(size, dtype=dtype)
    statistics = (None, None) if training else (stem.bn.running_mean, stem.bn.running_var)
    with torch.no_grad():
        parameters = (x, stem.conv.weight, stem.bn.weight, stem.bn.bias)
        _, indices, *_ = torch.ops.ceit.i2t(*parameters, *statistics, stem.bn.eps, True, None, None, "native")
        normalised = copy.deepcopy(stem).bn(stem.conv(x))
        _, flat = F.max_pool2d(normalised, 3, 2, 1, return_indices=True)
    rows, columns = (torch.arange(n, device=DEVICE) * 2 - 1 for n in flat.shape[2:])
    width = normalised.shape[3]
    expected = (flat // width - rows[:, None]) * 3 + flat % width - columns
    assert torch.equal(indices.long(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("column", [10, 11])
@pytest.mark.parametrize(("training", "dtype"), [(True, DTYPES[0]), *((False, d) for d in EXACT + DTYPES)], ids=str)
def test_nan_and_infinity_stay_where_plain_pytorch_has_them(training, dtype, column, value):
    torch.manual_seed(6)
    stem, x = make_stem(training=training).to(dtype), make_image((40, 33), dtype=dtype)
    x[0, 1, 20, column] = value
    with torch.no_grad():
        fused = copy.deepcopy(stem)(x)
        with use_backend("i2t=reference"):
            plain = copy.deepcopy(stem)(x)
    tolerance = 0.1 if dtype.itemsize == 2 else 1e-2
    torch.testing.assert_close(fused, plain, equal_nan=True, rtol=tolerance, atol=tolerance)
    if not training:
        assert fused[1].isfinite().all()


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "sliced"])
def test_any_layout_of_the_image_is_read_in_place(layout):
    torch.manual_seed(7)
    x = make_image((17, 20), dtype=torch.float32)
    views = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "expanded": x[:, :1].expand(-1, 3, -1, -1),
        "sliced": F.pad(x, (3, 2, 1, 1))[:, :, 1:-1, 3:-2],
    }
    stem = make_stem().float()
    view = views[layout]
    grad_out = pooled_like(x, 32)
    expected, _ = run_stem(stem, view.contiguous(), grad_out, "native")
    actual, _ = run_stem(stem, view, grad_out, "native")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_the_result_lies_as_the_patch_projection_reads_it():
    out = make_stem().float()(make_image((32, 64), dtype=torch.float32))
    assert out.permute(0, 2, 3, 1).is_contiguous()
    patches = out.permute(0, 2, 3, 1).unflatten(2, (4, 4)).unflatten(1, (2, 4)).transpose(2, 3)
    assert patches.data_ptr() == out.data_ptr()


def test_a_large_mean_does_not_drown_the_variance(full_precision):
    torch.manual_seed(8)
    stem = make_stem(1, gamma="positive").float()
    with torch.no_grad():
        stem.conv.weight.zero_()[:, :, 3, 3] = 1.0
        image = (1000.0 + make_image((63, 64), 1)).float()
        _, _, mean, variance, _ = torch.ops.ceit.i2t(
            image, stem.conv.weight, stem.bn.weight, stem.bn.bias, None, None, 1e-5, True, None, None, "native"
        )
    seen = image[:, 0, ::2, ::2].double()
    torch.testing.assert_close(mean.double(), seen.mean().expand(32), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), seen.var(unbiased=False).expand(32), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_and_any_schedule_give_the_same_bits(native, dtype):
    torch.manual_seed(9)
    stem, x = make_stem().to(dtype), make_image((35, 31), dtype=dtype)
    grad_out = pooled_like(x, 32)
    results = []
    for seed in range(6):
        if not ON_GPU:
            native.ceit_set_schedule(seed)
        results.append(run_stem(stem, x, grad_out, "native")[0])
    if not ON_GPU:
        native.ceit_set_schedule(0)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
