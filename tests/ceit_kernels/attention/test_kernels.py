"""The Triton kernel around PyTorch's attention against plain PyTorch, and when the module takes it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import instances
from support.accuracy import assert_as_accurate_over_draws
from support.where import ANY_SIZE_DTYPES, DEVICE, DTYPES, INTERPRETING, UNDER_TTSEM, autocast
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize, prune

from ceit import CeiT
from ceit_kernels import BackendError, FusedAttention, FusedLinear, fuse, self_attention, use_backend
from ceit_kernels.attention import parts

pytestmark = pytest.mark.kernels

BOTH = (torch.float32, torch.float32)
LAUNCH = "ceit_kernels.attention.triton.launch"


def make_gradients(shape, queries, dtype, draw=0):
    """Those of queries (B, P, H, D), keys and values (B, N, H, D)."""
    generator = torch.Generator().manual_seed(draw)
    batch, tokens, *heads = shape
    sizes = [(batch, n, *heads) for n in (queries, tokens, tokens)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for size in sizes]


def make_grad_out(grads, draw=9):
    """That of a projection behind attention (B * P, H * D)."""
    (batch, queries, heads, channels), dtype = grads[0].shape, grads[0].dtype
    size, generator = (batch * queries, heads * channels), torch.Generator().manual_seed(draw)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def run(grads, need_qkv=True, bias_dtype=torch.float32, grad_out=None, out_bias_dtype=None):
    """The kernel's results."""
    return parts._qkv_gradient(*grads, grad_out, need_qkv, bias_dtype, out_bias_dtype, "triton")


def check(shape, queries, dtype, bias_dtype=None):
    def draws():
        for draw in range(2):
            grads = make_gradients(shape, queries, dtype, draw)
            grad_out, into = make_grad_out(grads, draw), bias_dtype or dtype
            found, *biases = run(grads, True, into, grad_out, into)
            expected, *plain = parts._put_together(*grads, grad_out, True, into, into)
            assert torch.equal(found, expected)
            exact = [expected.double().sum((0, 1)), grad_out.double().sum(0)]
            if dtype == torch.float64:
                torch.testing.assert_close(biases, exact)
                return
            yield biases, plain, exact

    assert_as_accurate_over_draws(["bias", "bias behind attention"], draws())


@pytest.mark.parametrize("queries", [1, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_plain_pytorch(poisoned_memory, dtype, queries):
    check((2, 17, 3, 64), queries, dtype)


@settings(max_examples=4 if UNDER_TTSEM else 8, deadline=None)
@given(
    batch=st.integers(1, 5),
    tokens=st.integers(1, 40),
    first=st.booleans(),
    heads=st.integers(1, 6),
    channels=st.integers(1, 40),
    dtype=st.sampled_from(ANY_SIZE_DTYPES),
)
def test_agrees_at_any_size(batch, tokens, first, heads, channels, dtype):
    check((batch, tokens, heads, channels), 1 if first else tokens, dtype)


@pytest.mark.parametrize("channels", [1032, 4096])
def test_takes_as_many_channels_as_promised(poisoned_memory, channels):
    check((1, 5, 1, channels), 3, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_program_instance_sums_several_blocks_of_rows(poisoned_memory, monkeypatch, dtype):
    monkeypatch.setattr(f"{LAUNCH}._INSTANCES", 12)
    check((3, 37, 3, 64), 37, dtype, torch.float32)


def test_any_order_of_program_instances_gives_the_same_bits_again_and_again(monkeypatch):
    monkeypatch.setattr(f"{LAUNCH}._GROUP", 2)
    grads = make_gradients((1, 37, 3, 64), 37, torch.float32)
    call = grads, True, torch.float32, make_grad_out(grads), torch.float32
    expected = run(*call)
    for seed in range(2):
        instances.shuffle(monkeypatch, seed)
        found = run(*call)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_is_not_wanted_is_not_made():
    grads = make_gradients((2, 5, 2, 8), 5, torch.float32)
    grad_out, dtype = make_grad_out(grads), torch.float32
    whole = run(grads, True, dtype, grad_out, dtype)
    for wanted in itertools.product((True, False), repeat=3):
        if any(wanted):
            need_qkv, *dtypes = ((want and dtype) or None for want in wanted)
            found = run(grads, bool(need_qkv), dtypes[0], grad_out if dtypes[1] else None, dtypes[1])
            for tensor, expected, want in zip(found, whole, wanted, strict=True):
                assert torch.equal(tensor, expected) if want else tensor is None


@pytest.mark.gpu
def test_gradients_are_the_same_bits_a_thousand_times_on_two_streams_and_in_a_graph():
    grads = make_gradients((64, 197, 6, 64), 197, torch.bfloat16)
    call = grads, True, torch.bfloat16, make_grad_out(grads), torch.bfloat16
    expected = run(*call)
    streams = [torch.cuda.Stream() for _ in range(2)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*call)
    for _ in range(500):
        torch.cuda.synchronize()
        found = [captured]
        graph.replay()
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run(*call))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for each in found for a, b in zip(each, expected, strict=True))


def make_module(dtype=torch.float32, **options):
    torch.manual_seed(0)
    module = FusedAttention(48, 3, **{"qkv_bias": True} | options).to(DEVICE, dtype)
    return module, torch.randn(2, 11, 48).to(DEVICE, dtype).requires_grad_()


def step(backend, module, x, num_queries=None):
    """The result, and the gradients of x and of the parameters."""
    module.zero_grad(set_to_none=True)
    x.grad = None
    with use_backend(f"attention={backend},linear=auto"):
        out = module(x, num_queries)
    (out.float() * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
    return out, x.grad, {name: p.grad for name, p in module.named_parameters()}


@pytest.fixture
def launches(monkeypatch):
    """The dtypes of both biases, or None, of each launch."""
    found = []
    forward = parts._qkv_gradient.forward

    def noted(*arguments):
        found.append(arguments[5:7])
        return forward(*arguments)

    monkeypatch.setattr(parts._qkv_gradient, "forward", noted)
    return found


def assert_same_step(module, x, num_queries=None, **tolerances):
    with sdpa_kernel(SDPBackend.MATH):
        ours, theirs = (step(backend, module, x, num_queries) for backend in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, **tolerances)


@pytest.mark.parametrize("num_queries", [None, 1, 4])
@pytest.mark.parametrize("kind", [nn.Linear, FusedLinear], ids=str)
def test_the_module_takes_the_step_of_plain_pytorch(launches, kind, num_queries):
    module, x = make_module()
    module.qkv.__class__ = module.proj.__class__ = kind
    assert_same_step(module, x, num_queries)
    assert launches == [BOTH]


@pytest.mark.kernels(ttsem=False)
def test_every_block_of_a_model_takes_it_in_a_training_step(launches):
    torch.manual_seed(0)
    model = fuse(CeiT(img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=5, drop_path_rate=0.1)).to(DEVICE)
    images, found = torch.randn(3, 3, 32, 32).to(DEVICE), []
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        with use_backend(f"reference,attention={backend}"), sdpa_kernel(SDPBackend.MATH):
            out = model(images)
            found.append((out, torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    torch.testing.assert_close(*found)
    assert launches == [BOTH] * 2


def test_the_first_tokens_alone_have_gradients(launches):
    module, x = make_module()
    with use_backend("attention=triton"):
        every, first = module.forward_first(x, 1)
    assert not every.requires_grad
    found = torch.autograd.grad(first.square().sum(), [x, *module.parameters()])
    with use_backend("attention=reference"):
        expected = module(x, 1)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), [x, *module.parameters()]))
    assert launches == [BOTH]


def test_autocast_gives_the_bias_a_gradient_of_its_own_dtype(launches):
    module, x = make_module()
    dtype = torch.float16 if INTERPRETING else torch.bfloat16
    with autocast(dtype):
        assert_same_step(module, x, rtol=0.05, atol=0.05)
    assert launches == [BOTH]


FROZEN = {
    "bias": (("qkv.bias",), [(None, torch.float32)]),
    "weight": (("qkv.weight",), [BOTH]),
    "all but the bias": (("qkv.weight", "x"), [BOTH]),
    "all": (("qkv.weight", "qkv.bias", "x"), []),
    "bias behind attention": (("proj.bias",), [(torch.float32, None)]),
    "weight behind attention": (("proj.weight",), [BOTH]),
    "biases": (("qkv.bias", "proj.bias"), [(None, None)]),
}


@pytest.mark.parametrize(("frozen", "expected"), FROZEN.values(), ids=FROZEN)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(launches, frozen, expected):
    module, x = make_module()
    for name, tensor in (*module.named_parameters(), ("x", x)):
        tensor.requires_grad_(name not in frozen)
    assert_same_step(module, x)
    assert launches == expected
    assert all((p.grad is None) == (name in frozen) for name, p in module.named_parameters())


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def own_forward(layer):
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, 3 * layer.bias)


CHANGES = {
    "class": lambda layer: setattr(layer, "__class__", Twice),
    "forward hook": lambda layer: layer.register_forward_hook(lambda m, args, out: 2 * out),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda m, grads, outs: (2 * grads[0],)),
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "bias", nn.Tanh()),
    "pruning": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    "forward": own_forward,
    "no bias": lambda layer: setattr(layer, "bias", None),
}


@pytest.mark.parametrize("name", ["qkv", "proj"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_projection_that_is_no_plain_linear_layer_is_called(launches, change, name):
    module, x = make_module()
    change(getattr(module, name))
    assert_same_step(module, x)
    assert launches == [(None, torch.float32) if name == "qkv" else (torch.float32, None)]


def test_a_projection_to_other_channels_is_called(launches):
    module, x = make_module()
    module.proj = nn.Linear(48, 20).to(DEVICE)
    assert_same_step(module, x)
    assert launches == [(torch.float32, None)]


def test_the_result_may_be_changed_in_place(launches):
    module, x = make_module()
    module.proj_drop.register_forward_hook(lambda m, args, out: out.mul_(3).sub_(1))
    assert_same_step(module, x)
    assert launches == [BOTH]


@pytest.mark.parametrize("names", [("proj.bias",), ("x",), ("proj.weight", "qkv.bias")], ids=str)
def test_gradients_of_some_tensors_and_taken_again_are_those_of_plain_pytorch(launches, names):
    module, x = make_module()
    tensors = [dict(module.named_parameters(), x=x)[name] for name in names]
    found = []
    for backend in ("triton", "reference"):
        with use_backend(f"attention={backend}"), sdpa_kernel(SDPBackend.MATH):
            loss = module(x).square().sum()
        found += [torch.autograd.grad(loss, tensors, retain_graph=True) for _ in range(2)]
    for others in found[1:]:
        torch.testing.assert_close(found[0], others)


def test_hooks_of_the_biases_are_run_and_their_gradients_add_up(launches):
    module, x = make_module()
    biases, found = (module.qkv.bias, module.proj.bias), []
    for bias in biases:
        bias.register_hook(lambda grad: 3 * grad)
    for backend in ("triton", "reference"):
        module.zero_grad()
        with use_backend(f"attention={backend}"), sdpa_kernel(SDPBackend.MATH):
            (module(x).square().sum() + module(2 * x).square().sum()).backward()
        found.append([bias.grad for bias in biases])
    torch.testing.assert_close(*found)
    assert len(launches) == 2


@pytest.mark.kernels(ttsem=False)
def test_second_derivatives_and_batches_of_gradients_are_those_of_plain_pytorch(launches):
    module, x = make_module(torch.float64)
    inputs = [x, *module.parameters()]

    def penalty():
        first = torch.autograd.grad(module(x, 4).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    def rows():
        out = module(x, 1)[0, 0, :3]
        return torch.autograd.grad(out, inputs, torch.eye(3, dtype=x.dtype), is_grads_batched=True)

    with sdpa_kernel(SDPBackend.MATH):
        for call in (penalty, rows):
            found = []
            for backend in ("triton", "reference"):
                with use_backend(f"attention={backend}"):
                    found.append(call())
            torch.testing.assert_close(*found)


@pytest.mark.kernels(ttsem=False)
def test_gradients_are_those_of_finite_differences(launches):
    module, x = make_module(torch.float64)
    with use_backend("attention=triton"), sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradcheck(lambda *_: module(x, 3), (x, module.qkv.bias, module.proj.bias), fast_mode=True)
    assert launches


@pytest.mark.kernels(ttsem=False)
def test_opcheck_of_the_operator_which_autocast_leaves_alone():
    grads = make_gradients((2, 5, 2, 8), 3, torch.float32)
    grad_out, dtype = make_grad_out(grads), torch.float32
    for call in ((None, True, dtype, None), (None, True, None, None), (grad_out, False, torch.float64, dtype)):
        torch.library.opcheck(torch.ops.ceit.qkv_gradient.default, (*grads, *call, "triton"))
    with torch.autocast("cpu", torch.bfloat16):
        found, *_ = torch.ops.ceit.qkv_gradient(*grads, None, True, None, None, "triton")
    assert found.dtype == torch.float32


def test_the_function_puts_gradients_together_without_a_bias(launches):
    _, x = make_module()
    leaf = x.detach().requires_grad_()
    for backend in ("triton", "reference"):
        with use_backend(f"attention={backend}"), sdpa_kernel(SDPBackend.MATH):
            out = self_attention(leaf, num_heads=2, num_queries=3)
            out.square().sum().backward()
        x, leaf.grad = (leaf.grad, None) if backend == "triton" else (x, leaf.grad)
    torch.testing.assert_close(x, leaf.grad)
    assert launches == [(None, None)]


def test_the_registered_operator_is_none_of_them(launches):
    qkv = torch.zeros(2, 5, 48).to(DEVICE)
    with pytest.raises(BackendError, match=r"'triton' cannot run: around PyTorch's attention.*call the function"):
        torch.ops.ceit.attention(qkv, 2, 1.0, 5, False, "triton")


def test_a_dropout_is_left_to_plain_pytorch(launches):
    module, x = make_module(attn_drop=0.5)
    with use_backend("attention=triton"), pytest.raises(BackendError, match="attention dropout"):
        module(x)
    assert not launches
