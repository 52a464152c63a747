"""The compiled passes on the CPU against plain PyTorch, and the operators with them behind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.add_norm import EPS, SHAPES, check, check_over_draws, check_to_rounding, magnification, make_inputs, run
from support.processors import LESSER, run_with
from torch import nn

from ceit_kernels import FusedAddNorm, add_layer_norm, use_backend

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_the_cpu():
    with use_backend("add_norm=native"):
        yield


def make(*args, **options):
    return make_inputs(*args, device="cpu", **options)


def shorten(grads, prefix):
    return [*grads[:2], grads[2][:, : None if prefix is None else abs(prefix)]]


@pytest.mark.parametrize("prefix", [None, 1, -1])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_plain_pytorch(poisoned_memory, shape, dtype, branch, prefix):
    def draw_call(draw):
        inputs, grads = make(shape, dtype, branch, seed=draw)
        return inputs, shorten(grads, prefix)

    check_over_draws("native", draw_call, prefix)


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_to_rounding_in_float64(poisoned_memory, shape, affine, branch):
    inputs, grads = make(shape, torch.float64, branch, affine)
    check_to_rounding("native", inputs, shorten(grads, 1), 1)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 6),
    tokens=st.integers(1, 40),
    channels=st.integers(1, 300),
    dtype=st.sampled_from([torch.bfloat16, torch.float64]),
    branch=st.booleans(),
    affine=st.booleans(),
    prefix=st.sampled_from([None, 1, -1]),
)
def test_agrees_at_any_size(batch, tokens, channels, dtype, branch, affine, prefix):
    inputs, grads = make((batch, tokens, channels), dtype, branch, affine)
    if dtype == torch.float64:
        # Rows of few channels may lie close together.
        atol = 1e-12 * max(1.0, magnification(inputs))
        check_to_rounding("native", inputs, shorten(grads, prefix), prefix, atol)
    else:
        check("native", inputs, shorten(grads, prefix), prefix)


@pytest.mark.parametrize("channels", [1535, 4096])
def test_wide_rows_and_many_rows_lose_no_digits(channels):
    check("native", *make((1, 3, channels), torch.float32))
    check("native", *make((40, 197, 32), torch.float32))


@pytest.mark.parametrize("branch", [True, False])
def test_a_mean_of_ten_thousand_deviations_costs_no_more_accuracy_than_in_plain_pytorch(branch):
    check("native", *make((3, 5, 384), torch.float32, branch, mean=1e4))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_takes_any_number_of_dimensions(rank):
    (x, branch, weight, bias), grads = make((2, 6, 32), torch.float32)
    shape = {1: (32,), 2: (6, 32), 4: (2, 2, 3, 32)}[rank]
    x, branch, *grads = (t.reshape(-1)[: torch.Size(shape).numel()].view(shape) for t in (x, branch, *grads[:2]))
    check("native", [x, branch, weight, bias], grads)


@pytest.mark.parametrize("with_branch", [True, False])
def test_takes_strided_and_expanded_inputs_and_gradients(with_branch):
    def draw_call(draw):
        (x, branch, weight, bias), grads = make((4, 6, 32), torch.float32, seed=draw)
        strided = [x[:1, :, :16].repeat(1, 1, 2).expand(4, 6, 32), branch.transpose(0, 1).contiguous().transpose(0, 1)]
        parameters = [weight.repeat_interleave(2)[::2], bias[:1].expand(32)]
        grads = [grads[0][:1].expand(4, 6, 32), grads[1][:, :, :1].expand(4, 6, 32), grads[2][:, :1].expand(4, 2, 32)]
        return [strided[0], strided[1] if with_branch else None, *parameters], grads

    check_over_draws("native", draw_call, prefix=2)


@pytest.mark.parametrize("shape", [(0, 6, 32), (3, 0, 32)], ids=str)
@pytest.mark.parametrize("branch", [True, False])
def test_no_rows_give_empty_results_and_zero_parameter_gradients(shape, branch):
    inputs, grads = make(shape, torch.float32, branch)
    total, out, *gradients = run("native", inputs, grads)
    assert total.shape == out.shape == gradients[0].shape == shape
    assert not gradients[-1].any()
    assert not gradients[-2].any()


@pytest.mark.parametrize("branch", [True, False])
def test_inference_gives_what_training_gives(branch):
    inputs, grads = make((3, 7, 64), torch.float32, branch)
    expected = run("native", inputs, grads, 2)[:3]
    with torch.no_grad():
        results = add_layer_norm(*inputs, EPS, num_prefix_tokens=2)
    torch.testing.assert_close(results, tuple(expected), rtol=0, atol=0)


@pytest.mark.parametrize("leaves", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)], ids=str)
def test_frozen_inputs_get_no_gradient_and_the_others_the_same(leaves):
    inputs, grads = make((3, 5, 48), torch.float32)
    expected = run("native", inputs, grads)[2:]
    tensors = [t.detach().requires_grad_(i in leaves) for i, t in enumerate(inputs)]
    results = add_layer_norm(*tensors, EPS)
    used = [(t, g) for t, g in zip(results, grads, strict=False) if t.requires_grad]
    torch.autograd.backward([t for t, _ in used], [g for _, g in used])
    for i, (tensor, want) in enumerate(zip(tensors, expected, strict=True)):
        if i in leaves:
            assert torch.equal(tensor.grad, want)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_results_that_nothing_uses_need_no_gradient(used, branch):
    inputs, grads = make((3, 5, 48), torch.float32, branch)
    gradients = {}
    for backend in ("native", "reference"):
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        with use_backend(f"add_norm={backend}"):
            results = add_layer_norm(*leaves, EPS, num_prefix_tokens=2)
        torch.autograd.backward([results[i] for i in used], [grads[i] for i in used])
        gradients[backend] = [None if t is None else t.grad for t in leaves]
    for ours, theirs in zip(gradients["native"], gradients["reference"], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wide", ["x", "branch"])
def test_a_sum_of_two_dtypes_is_of_the_wider_and_each_gets_a_gradient_of_its_own(wide):
    inputs, grads = make((3, 5, 48), torch.float32)
    inputs[wide == "x"] = inputs[wide == "x"].to(torch.bfloat16)
    check("native", inputs, grads)


def test_autocast_leaves_the_dtype_of_the_sum():
    inputs, _ = make((3, 5, 48), torch.float32)
    x, branch = (t.bfloat16() for t in inputs[:2])
    with torch.autocast("cpu", torch.bfloat16):
        total, out = add_layer_norm(x, branch, *inputs[2:], EPS)
    assert total.dtype == out.dtype == torch.bfloat16
    expected = nn.functional.layer_norm((x + branch).float(), (48,), *inputs[2:], EPS)
    torch.testing.assert_close(out, expected.bfloat16())


def test_the_operator_gives_the_norm_in_the_dtype_that_it_is_asked_for():
    inputs, (grad_out, *_) = make((3, 5, 48), torch.bfloat16)
    leaves = [t.requires_grad_() for t in inputs]
    total, out, *_ = torch.ops.ceit.add_norm(*leaves, EPS, 0, True, torch.float32, "native")
    assert (total.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    expected = nn.functional.layer_norm(total.float(), (48,), *(t.float() for t in leaves[2:]), EPS)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out, leaves, grad_out.float(), retain_graph=True)
    assert all(grad.dtype == torch.bfloat16 for grad in gradients)
    wide = torch.autograd.grad(expected, leaves[2:], grad_out.float())
    torch.testing.assert_close(gradients[2:], wide)


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=str)
def test_registration_passes_pytorchs_own_checks(branch, out_dtype):
    inputs, _ = make((2, 5, 24), torch.float32 if out_dtype is None else torch.bfloat16, branch)
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.ceit.add_norm, (*leaves, EPS, 2, True, out_dtype, "native"))


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)], ids=str)
@pytest.mark.parametrize(("others", "last"), [(True, False), (True, True), (False, False)])
def test_registration_of_backward_passes_pytorchs_own_checks(needs, others, last):
    (total, grad_out, weight, bias), grads = make((2, 5, 24), torch.float32)
    rest = grads[1:] if others else (None, None)
    mean, rstd = total.mean(-1), total.var(-1).rsqrt()
    arguments = (grad_out, *rest, total, weight, bias, mean, rstd, None, *needs, last, "native")
    torch.library.opcheck(torch.ops.ceit.add_norm_backward, arguments)


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("prefix", [None, 2, -2])
def test_gradients_are_those_of_finite_differences(branch, prefix):
    inputs, _ = make((2, 3, 6), torch.float64, branch)
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *args: add_layer_norm(*args, num_prefix_tokens=prefix), leaves)


@pytest.mark.parametrize("branch", [True, False])
def test_a_second_derivative_is_an_error_that_says_what_to_do(branch):
    inputs, _ = make((2, 5, 24), torch.float32, branch)
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    results = add_layer_norm(*leaves)
    (grad,) = torch.autograd.grad([t.square().sum() for t in results], leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"add_layer_norm is differentiable once.*reference"):
        grad.sum().backward()


class Chain(nn.Module):
    """Two residual connections, as a block has them."""

    def __init__(self):
        super().__init__()
        self.add_norm = FusedAddNorm()
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)

    def forward(self, x):
        x, y, first = self.add_norm(x, None, self.norm1, 1)
        x, y = self.add_norm(x, y.sin(), self.norm2)
        return x + y, first


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_and_exports_without_a_break(dynamic):
    module, (x, *_) = Chain(), make((2, 5, 24), torch.float32)[0]
    leaves = [x.requires_grad_(), *module.parameters()]
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    found = []
    for call in (module, compiled):
        results = call(x)
        found.append([*results, *torch.autograd.grad([t.square().sum() for t in results], leaves)])
    torch.testing.assert_close(*found)
    exported = torch.export.export(module.eval().requires_grad_(False), (x.detach(),))
    assert str(exported.graph).count("ceit.add_norm") == 2
    torch.testing.assert_close(exported.module()(x.detach()), module(x.detach()))


def test_any_number_of_threads_gives_the_same_bits():
    inputs, grads = make((5, 197, 64), torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run("native", inputs, grads, 2))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=0, atol=0)


@pytest.mark.prove
@pytest.mark.parametrize("kind", LESSER)
def test_code_for_lesser_processors_agrees(kind):
    code = """
import torch
from support.add_norm import SHAPES, check, check_to_rounding, make_inputs
for shape in SHAPES:
    for dtype, agrees in ((torch.float32, check), (torch.bfloat16, check), (torch.float64, check_to_rounding)):
        agrees("native", *make_inputs(shape, dtype, device="cpu"))
"""
    run_with(kind, code)
