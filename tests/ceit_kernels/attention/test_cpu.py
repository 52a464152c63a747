"""Self-attention's code for the CPU against plain PyTorch."""

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import assert_as_accurate_over_draws
from support.attention import make_call, step
from support.processors import LESSER, run_with

from ceit_kernels import self_attention, use_backend
from ceit_kernels.attention.cpu import attention_infer_cpu

NAMES = ("out", "grad_qkv")
DRAWS = 8
# batch, tokens, heads, channels of a head, queries
CASES = [(2, 197, 3, 64, None), (2, 50, 2, 33, 17), (1, 300, 1, 8, 1), (3, 1, 2, 5, None), (1, 49, 2, 130, 49)]


@pytest.fixture(autouse=True)
def on_the_cpu():
    with use_backend("attention=native"):
        yield


def compute(qkv, grad_out, heads, **options):
    """Results: of the backend, plain and exact."""
    exact = step("reference", qkv.double(), grad_out.double(), heads, **options)
    return (*(step(backend, qkv, grad_out, heads, **options) for backend in ("native", "reference")), exact)


def check(make, heads, tolerance=1e-12, **options):
    """The error rule over draws that ``make`` gives in 16 and 32 bits; to rounding, by a tolerance, in 64."""
    qkv, grad_out = make(0)
    if qkv.dtype == torch.float64:
        fused, _, exact = compute(qkv, grad_out, heads, **options)
        for name, ours, truth in zip(NAMES, fused, exact, strict=True):
            atol = tolerance * max(1.0, truth.abs().max().item())
            torch.testing.assert_close(ours, truth, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    else:
        assert_as_accurate_over_draws(NAMES, (compute(*make(draw), heads, **options) for draw in range(DRAWS)))


def draws_of(*call, **options):
    return lambda draw: make_call(*call, **options, draw=draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_plain_pytorch(poisoned_memory, case, dtype):
    batch, tokens, heads, channels, num_queries = case
    check(draws_of(batch, tokens, heads, channels, dtype, num_queries), heads)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 110),
    heads=st.integers(1, 3),
    channels=st.integers(1, 140),
    queries=st.floats(0, 1),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
)
def test_agrees_at_any_size(batch, tokens, heads, channels, queries, dtype):
    check(draws_of(batch, tokens, heads, channels, dtype, max(1, round(queries * tokens))), heads)


@pytest.mark.parametrize("tokens", [150, 600])
@pytest.mark.parametrize("channels", [1, 64, 256])
def test_long_sums_are_as_accurate(tokens, channels):
    check(draws_of(1, tokens, 1, channels, torch.float32), 1)


@pytest.mark.parametrize("scale", [None, 0.3, -0.5, 0.0])
def test_takes_a_scale(scale):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check(draws_of(2, 20, 2, 16, dtype), 2, scale=scale)


@pytest.mark.parametrize("scale", [0.3, -0.5, 0.0])
def test_adds_a_bias_to_scores_of_any_scale(scale):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 21, 16, dtype=torch.float64)
    bias = torch.randn(3, 21, 21, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, bias[None], scale=scale).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention_infer_cpu(q, k, v, bias, scale), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [30.0, 100.0])
def test_scores_of_thousands_saturate_as_they_should(size):
    for dtype in (torch.float32, torch.float64):
        # A rounding of a score counts as often as the score has units.
        check(draws_of(2, 70, 2, 16, dtype, size=size), 2, tolerance=1e-15 * size**2)
    qkv, _ = make_call(2, 70, 2, 16, torch.float64, size=size)
    scores = (qkv[0, :, :16] @ qkv[0, :, 32:48].T).abs().max() / 4
    assert scores > 10 * size


@pytest.mark.parametrize("score", [-1e4, 1e4])
def test_scores_that_are_alike_and_far_from_zero_weigh_alike(score):
    def make(draw):
        qkv, grad_out = make_call(1, 37, 1, 4, torch.float32, draw=draw)
        qkv[..., :4], qkv[..., 4:8] = score / 2, 1.0  # four products, and a scale of a half
        return qkv, grad_out

    check(make, 1)
    qkv, _ = make(0)
    out = self_attention(qkv, num_heads=1)
    torch.testing.assert_close(out[0], qkv[0, :, 8:].mean(0).expand(37, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("part", [0, 1, 2])
def test_what_is_no_number_stays_none(part, value, dtype):
    qkv, _ = make_call(1, 61, 1, 19, dtype)
    qkv[0, 7, part * 19 + 18] = value
    out = self_attention(qkv, num_heads=1)
    with use_backend("attention=reference"):
        assert torch.equal(out.isnan(), self_attention(qkv.float(), num_heads=1).isnan())
    assert not out.isfinite().all()


def test_takes_strided_and_expanded_inputs_and_gradients():
    qkv, grad_out = make_call(3, 30, 2, 12, torch.float64)
    expanded = qkv[:1].expand_as(qkv), grad_out[:, :, :1].expand_as(grad_out)
    strided = qkv.transpose(0, 1).contiguous().transpose(0, 1), grad_out.transpose(1, 2).contiguous().transpose(1, 2)
    for call in (expanded, strided):
        check(lambda _, call=call: call, 2)


def test_an_empty_batch_has_an_empty_result():
    out, grad = step("native", torch.zeros(0, 5, 24), torch.zeros(0, 5, 8), 2)
    assert out.shape == (0, 5, 8)
    assert grad.shape == (0, 5, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_gives_the_bits_of_training(dtype):
    qkv, grad_out = make_call(2, 60, 2, 16, dtype)
    assert torch.equal(self_attention(qkv, num_heads=2), step("native", qkv, grad_out, 2)[0])


def test_the_number_of_threads_changes_nothing():
    qkv, grad_out = make_call(2, 130, 3, 24, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(step("native", qkv, grad_out, 3))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_several_threads_may_run_at_once():
    qkv, grad_out = make_call(2, 130, 3, 24, torch.float32)
    expected, results = step("native", qkv, grad_out, 3), [None] * 4

    def work(i):
        for _ in range(5):
            results[i] = torch.ops.ceit.attention(qkv, 3, 24**-0.5, 130, False, "native")[0]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(result, expected[0]) for result in results)


@pytest.mark.prove
@pytest.mark.parametrize("kind", LESSER)
def test_code_for_lesser_processors_agrees(kind, tmp_path):
    calls = [(2, 90, 2, 33, dtype, num_queries) for dtype in (torch.float32, torch.float64) for num_queries in (90, 50)]
    results = [step("native", *make_call(*call), call[2]) for call in calls]
    torch.save((calls, results), tmp_path / "expected")
    code = """
import torch
from support.attention import make_call, step
for call, expected in zip(*torch.load(sys.argv[2])):
    found = step("native", *make_call(*call), call[2])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
"""
    run_with(kind, code, tmp_path / "expected")
