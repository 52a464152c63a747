"""LeFF on the CPU against plain PyTorch: the compiled kernels and the matmuls between them."""

import copy
import itertools
import threading
from functools import partial

import pytest
import support.leff
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import assert_as_accurate
from support.leff import (
    TRAINING_CASES,
    make_call,
    make_leff,
    make_tokens,
    make_training_leff,
    pass_through_with_means,
    run,
    train_step,
)
from support.processors import LESSER, run_with
from torch import nn

from ceit_kernels import freeze, fuse, use_backend
from ceit_kernels.leff import LocallyEnhancedFeedForward

CASES = [
    *TRAINING_CASES,
    ((1, 14, 14, 1, 48, 192, 48, 3), "bbb"),
    ((2, 9, 37, 0, 16, 100, 16, 7), "fnb"),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_the_cpu():
    with use_backend("leff=native"):
        yield


@pytest.fixture(params=[1, 2], ids=["an image a thread", "images shared by threads"])
def threads(request):
    """How many threads there are; images that are too few for all are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


check = partial(support.leff.check, "native", most=12)
check_to_rounding = partial(support.leff.check_to_rounding, "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "norms"), CASES, ids=str)
def test_training_agrees_with_plain_pytorch(poisoned_memory, threads, case, norms, dtype):
    check(lambda draw: make_call(case, dtype, norms, draw))


@pytest.mark.parametrize(("case", "norms"), CASES, ids=str)
def test_training_agrees_to_rounding_in_float64(poisoned_memory, threads, case, norms):
    check_to_rounding(*make_call(case, torch.float64, norms))


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Identity, lambda: nn.GELU("tanh")])
def test_other_activations(activation):
    check_to_rounding(*make_call((2, 2, 3, 1, 8, 16, 8, 3), torch.float64, act_layer=activation))
    check(lambda draw: make_call((2, 4, 5, 1, 8, 40, 8, 3), torch.float32, draw=draw, act_layer=activation))


def test_derivatives_jump_where_plain_pytorchs_do():
    support.leff.check_kinks("native", [-3.0, 0.0, 3.0, 6.0, -0.0, 5.0])


@pytest.mark.parametrize("norms", ["".join(modes) for modes in itertools.product("bfn", repeat=3)])
def test_norms_of_each_kind_go_together(norms):
    check_to_rounding(*make_call((2, 2, 2, 1, 8, 16, 8, 3), torch.float64, norms))


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    prefix=st.integers(0, 2),
    # A map of one channel fits two memory formats, of which plain PyTorch's norms take the wrong one.
    channels=st.integers(2, 40),
    hidden=st.integers(2, 150),
    kernel_size=st.sampled_from([3, 5, 7]),
)
def test_agrees_at_any_size(batch, grid, prefix, channels, hidden, kernel_size):
    norms = "bbb" if batch * grid[0] * grid[1] > 8 else "fff"
    case = (batch, *grid, prefix, channels, hidden, channels, kernel_size)
    # Statistics of a few values magnify any rounding.
    check_to_rounding(*make_call(case, torch.float64, norms), tolerance=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bn", [True, False])
@pytest.mark.parametrize("case", [case for case, _ in CASES], ids=str)
def test_inference_agrees_with_plain_pytorch(poisoned_memory, case, with_bn, dtype):
    batch, height, width, prefix, channels, hidden, out, kernel_size = case
    leff = make_leff(channels, hidden, out, kernel_size, dtype, prefix, with_bn=with_bn)
    x = make_tokens(batch, prefix + height * width, channels, dtype)
    residual = make_tokens(batch, prefix + height * width, out, dtype, seed=1)
    for added in (None, residual):
        wide = None if added is None else added.double()
        exact = run("reference", copy.deepcopy(leff).double(), x.double(), (height, width), wide)
        fused, plain = (run(backend, leff, x, (height, width), added) for backend in ("native", "reference"))
        assert_as_accurate(["out"], [fused], [plain], [exact])


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    channels=st.integers(2, 40),
    out=st.integers(1, 70),
    kernel_size=st.sampled_from([3, 5, 7]),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    added=st.booleans(),
)
def test_inference_leaves_images_in_memory_as_they_are(batch, grid, channels, out, kernel_size, dtype, added):
    leff = make_leff(channels, 24, out, kernel_size, dtype, 0, layout="NCHW")
    x, residual = (torch.randn(batch, size, *grid).to(dtype) for size in (channels, out))
    results = []
    for memory in (torch.contiguous_format, torch.channels_last):
        inputs = x.to(memory_format=memory), None, residual.to(memory_format=memory) if added else None
        results += [run("native", leff, *inputs), freeze(leff)(*inputs)]
        assert all(result.is_contiguous(memory_format=memory) for result in results[-2:])
    assert all(torch.equal(results[0], result) for result in results)
    if dtype == torch.float64:
        expected = run("reference", leff, x, None, residual if added else None)
        torch.testing.assert_close(results[0], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("layout", "prefix", "batch"), [("NCHW", 0, 1), ("NCHW", 0, 3), ("tokens", 2, 3)])
def test_inference_takes_large_images_by_bands(threads, layout, prefix, batch):
    leff = make_leff(4, 256, 4, 5, torch.float64, prefix, layout=layout)
    x = make_tokens(batch, prefix + 79 * 60, 4, torch.float64)
    x = x.mT.unflatten(2, (79, 60)).contiguous() if layout == "NCHW" else x
    fused, plain = (run(backend, leff, x, (79, 60), x) for backend in ("native", "reference"))
    torch.testing.assert_close(fused, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("where", ["image", "gradient"])
def test_a_nan_in_one_image_stays_in_it_with_frozen_norms(dtype, where):
    leff = make_training_leff(8, 16, 8, 3, dtype, norms="fff")
    x, grad_out = (make_tokens(3, 10, 8, dtype, seed=seed) for seed in (0, 1))
    (x if where == "image" else grad_out)[1, 5, 3] = float("nan")
    step = train_step("native", leff, x, grad_out)
    for name in ("out", "x.grad"):
        finite = step[name].isfinite().flatten(1).all(1).tolist()
        assert finite == [True, where == "gradient" and name == "out", True]


def test_inference_follows_a_weight_that_changes():
    leff, x = make_leff(8, 16, 8, 3, torch.float32), make_tokens(2, 10, 8, torch.float32)
    before = leff(x)
    with torch.no_grad():
        leff.conv1.weight.mul_(2)
    torch.testing.assert_close(leff(x), run("reference", leff, x))
    assert not torch.equal(leff(x), before)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_activations_are_as_accurate_where_inputs_are_small_or_large(scale):
    def make(draw):
        leff, x, grad_out, grid_size = make_call((2, 4, 4, 1, 16, 64, 16, 3), torch.float32, "nnn", draw)
        return leff, x * scale, grad_out, grid_size

    check(make)


def test_statistics_survive_a_mean_of_ten_thousand_deviations():
    leff, x, grad_out, grid_size = make_call((2, 4, 4, 1, 16, 16, 16, 3), torch.float32)
    pass_through_with_means(leff, 1e4)
    exact = train_step("reference", copy.deepcopy(leff).double(), x.double(), grad_out.double(), grid_size)
    fused = train_step("native", leff, x, grad_out, grid_size)
    for name in ("bn1.running_var", "bn2.running_var", "bn3.running_var"):
        torch.testing.assert_close(fused[name].double(), exact[name], rtol=2e-2, atol=0)


def test_takes_strided_and_expanded_inputs_and_gradients():
    leff, x, grad_out, grid_size = make_call((4, 3, 3, 1, 16, 24, 16, 3), torch.float64)
    check_to_rounding(leff, x[:1].expand_as(x), grad_out[:, :, :1].expand_as(grad_out), grid_size)
    check_to_rounding(leff, x.transpose(1, 2).contiguous().transpose(1, 2), grad_out, grid_size)


@pytest.mark.parametrize("frozen", ["conv1", "conv2", "conv3", "bn1", "bn2", "bn3", "x"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    leff, x, grad_out, grid_size = make_call((2, 3, 3, 1, 8, 16, 8, 3), torch.float64)
    expected = train_step("native", copy.deepcopy(leff), x, grad_out, grid_size)
    if frozen != "x":
        getattr(leff, frozen).requires_grad_(False)
    else:
        leff.requires_grad_(False)
    found = train_step("native", leff, x, grad_out, grid_size)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12, msg=lambda m, n=name: n + m)


def test_gradients_are_those_of_finite_differences():
    leff, x, _, grid_size = make_call((2, 2, 2, 1, 3, 4, 3, 3), torch.float64)
    names, parameters = zip(*leff.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(leff, dict(zip(names, values, strict=True)), (x, grid_size))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *parameters))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_residual_of_any_type_is_added_and_gets_its_gradient(dtype, training):
    leff, x, _, grid_size = make_call((2, 3, 3, 1, 16, 24, 16, 3), dtype)
    leff.train(training)
    for kind in (torch.bfloat16, torch.float32, torch.float64):
        residual, results = torch.randn_like(x, dtype=kind).requires_grad_(), []
        for backend in ("native", "reference"):
            with use_backend(backend):
                out = copy.deepcopy(leff)(x, grid_size, residual)
            results.append((out, *torch.autograd.grad(out.square().sum(), residual)))
        tolerance = 0.05 if torch.bfloat16 in (dtype, kind) else 1e-4
        torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)  # checks dtypes too


@pytest.mark.parametrize("training", [True, False])
def test_autocast_computes_in_bfloat16_and_adds_the_residual_in_float32(training):
    leff, x, grad_out, grid_size = make_call((2, 3, 3, 1, 16, 24, 16, 3), torch.float32)
    leff.train(training)
    with torch.autocast("cpu", torch.bfloat16):
        out = leff(x.requires_grad_(), grid_size, x)
    assert out.dtype == torch.float32
    out.backward(grad_out)
    plain = copy.deepcopy(leff).bfloat16()
    expected = run("reference", plain, x.detach().bfloat16(), grid_size, x.detach().bfloat16())
    torch.testing.assert_close(out.detach(), expected.detach().float(), rtol=0.05, atol=0.05)
    assert leff.conv1.weight.grad.dtype == torch.float32


def test_compiles_without_a_break():
    leff, x, grad_out, grid_size = make_call((2, 3, 3, 1, 8, 16, 8, 3), torch.float64)
    expected = train_step("native", copy.deepcopy(leff), x, grad_out, grid_size)
    compiled = torch.compile(leff, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    out = compiled(x, grid_size)
    out.backward(grad_out)
    torch.testing.assert_close(out.detach(), expected["out"])
    torch.testing.assert_close(x.grad, expected["x.grad"])
    with torch.no_grad():
        leff.eval()
        torch.testing.assert_close(compiled(x, grid_size), leff(x, grid_size))


@pytest.mark.parametrize("norms", ["bbb", "fff", "nnn"])
def test_registration_passes_pytorchs_own_checks(norms):
    leff, x, _, grid_size = make_call((2, 3, 2, 1, 4, 6, 4, 3), torch.float32, norms)
    calls = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "ceit" in str(func):
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Spy(), torch.no_grad():
        leff(x, grid_size)
        leff.eval()(x, grid_size)
    assert calls
    for func, args in calls:
        if "inference" in str(func):  # which has no gradient
            args = tuple(a.detach() if isinstance(a, nn.Parameter) else a for a in args)
        torch.library.opcheck(func, args)


def test_the_number_of_threads_changes_only_rounding_and_two_runs_nothing():
    leff, x, grad_out, grid_size = make_call((5, 7, 6, 1, 24, 100, 24, 3), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(train_step("native", copy.deepcopy(leff), x, grad_out, grid_size))
    finally:
        torch.set_num_threads(threads)
    # The GEMMs' sums may depend on the number of threads.
    for other in results[1:]:
        for name, value in results[0].items():
            atol = max(1e-5, 5e-7 * value.abs().max().item())
            torch.testing.assert_close(value, other[name], rtol=0, atol=atol, msg=lambda m, n=name: n + m)
    again = train_step("native", copy.deepcopy(leff), x, grad_out, grid_size)
    same = train_step("native", copy.deepcopy(leff), x, grad_out, grid_size)
    assert all(torch.equal(again[name], same[name]) for name in same)


def test_several_threads_may_run_inference_at_once():
    leff, x = make_leff(24, 96, 24, 3, torch.float32), make_tokens(4, 50, 24, torch.float32)
    expected, results = leff(x), [None] * 4

    def work(i):
        for _ in range(10):
            results[i] = leff(x)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.prove
@pytest.mark.parametrize("kind", LESSER)
def test_code_for_lesser_processors_agrees(kind, tmp_path):
    leff, x, grad_out, grid_size = make_call((2, 5, 7, 1, 24, 100, 24, 3), torch.float32)
    torch.save((x, grad_out, train_step("native", copy.deepcopy(leff), x, grad_out, grid_size)), tmp_path / "expected")
    code = """
import torch
from support.leff import make_training_leff, train_step
x, grad_out, expected = torch.load(sys.argv[2])
leff = make_training_leff(24, 100, 24, 3, torch.float32)
found = train_step("native", leff, x, grad_out, (5, 7))
for name, value in expected.items():
    torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-4)
"""
    run_with(kind, code, tmp_path / "expected")


def test_a_forked_process_may_go_on():
    leff, x = make_leff(24, 96, 24, 3, torch.float32), make_tokens(4, 50, 24, torch.float32)
    leff(x)
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def work():
        torch.set_num_threads(1)
        queue.put(leff(x).sum().item())

    process = context.Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert queue.get() == pytest.approx(leff(x).sum().item(), rel=1e-4, abs=1e-4)


def test_other_outputs_without_prefix_tokens_run_under_autocast():
    plain = LocallyEnhancedFeedForward(8, hidden_features=16, out_features=4, num_prefix_tokens=0).eval()
    x, residual = torch.randn(2, 9, 8), torch.randn(2, 9, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = plain(x, (3, 3), residual)
        with use_backend("native"):
            found = fuse(copy.deepcopy(plain))(x, (3, 3), residual)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
