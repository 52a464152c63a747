"""An encoder block's training step in one compiled call forward and one backward on the CPU."""

import copy

import pytest
import torch
from support.accuracy import assert_as_accurate_over_draws
from torch import nn
from torch.nn.utils import parametrize, prune

from ceit.blocks import Block, encoder_parts
from ceit_kernels import fuse, use_backend
from ceit_kernels.block import encoder_training
from ceit_kernels.common.sync_norm import SyncBatchNorm2d

GRID = (4, 5)


def make_block(dtype=torch.float32, **options) -> Block:
    torch.manual_seed(0)
    block = Block(24, 3, **{"qkv_bias": True, **options})
    for module in block.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return block.to(dtype)


def make_tokens(batch=3, dtype=torch.float32, seed=1):
    return torch.randn(batch, 21, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(block, x, grads=None, autocast=False):
    """Tokens and class token, the gradients of x and of all parameters, and the buffers behind a step."""
    block = copy.deepcopy(block)
    x = x.clone().requires_grad_()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = block.forward_with_class_token(x, GRID, False)
    grads = grads or [torch.cos(torch.arange(r.numel()).view(r.shape) * 0.7).to(r.dtype) for r in results]
    torch.autograd.backward(results, grads)
    return [*results, x.grad, *(p.grad for p in block.parameters()), *block.buffers()]


@pytest.fixture
def calls(monkeypatch):
    """The results of all calls for fused blocks, None where one ran by its operators."""
    found = []

    def spy(*arguments):
        result = encoder_training(*arguments)
        if arguments[1] is not None:
            found.append(result)
        return result

    monkeypatch.setattr("ceit.blocks.encoder_training", spy)
    return found


def test_is_as_accurate_as_plain_pytorch(calls):
    assert_step_is_as_accurate(make_block(), 3)
    assert None not in calls


def assert_step_is_as_accurate(plain, batch, autocast=False):
    fused, exact = fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    named = [*plain.named_parameters(), *plain.named_buffers()]
    names = ["out", "class token", "x", *(name for name, _ in named)]

    def draws():
        for seed in range(12):
            x = make_tokens(batch, seed=seed)
            found, expected = step(fused, x, autocast=autocast), step(plain, x, autocast=autocast)
            yield [t.float() for t in found], [t.float() for t in expected], step(exact, x.double())
            assert [t.dtype for t in found] == [t.dtype for t in expected]

    assert_as_accurate_over_draws(names, draws())


def freeze_norms(block, names):
    for name in names:
        block.get_submodule(name).eval()
    return block


@pytest.mark.parametrize(
    ("batch", "options", "frozen"),
    [
        (3, {}, ()),
        (1, {"qkv_bias": False, "kernel_size": 5, "mlp_ratio": 1.4}, ()),
        (5, {"drop_path": 0.4}, ()),
        (3, {"drop_path": 0.4, "with_bn": False, "qk_scale": 0.3}, ()),
        (3, {"mlp_ratio": 9.0}, ("leff.bn2",)),
        (2, {"drop_path": 0.4}, ("",)),
    ],
    ids=["whole", "other sizes", "stochastic depth", "no norms", "one frozen norm", "evaluation"],
)
def test_under_autocast_is_as_accurate_as_plain_pytorch_and_of_its_dtypes(calls, batch, options, frozen):
    assert_step_is_as_accurate(freeze_norms(make_block(**options), frozen), batch, autocast=True)
    assert None not in calls


def test_gradients_under_autocast_are_those_that_are_wanted_one_by_one_or_several_at_once(calls):
    block, x = fuse(make_block()), make_tokens().requires_grad_()
    block.attn.requires_grad_(False)
    block.norm1.requires_grad_(False)
    block.leff.bn2.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x, GRID)
    wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
    grads = torch.randn(2, *out.shape)
    together = torch.autograd.grad(out, wanted, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        found = torch.autograd.grad(out, wanted, grad, retain_graph=True)
        torch.testing.assert_close([g[i] for g in together], list(found), rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert all((p.grad is not None) is p.requires_grad for p in block.parameters())
    assert None not in calls


@pytest.mark.parametrize(
    ("batch", "options", "frozen"),
    [
        (1, {}, ()),
        (2, {"qkv_bias": False, "kernel_size": 5, "mlp_ratio": 1.4}, ()),
        (5, {"drop_path": 0.4}, ()),
        (3, {"drop_path": 0.4, "with_bn": False, "qk_scale": 0.3}, ()),
        (3, {"mlp_ratio": 9.0}, ("leff.bn2",)),
        (2, {"drop_path": 0.4}, ("",)),
    ],
    ids=["one image", "other sizes", "stochastic depth", "no norms", "one frozen norm", "evaluation"],
)
def test_agrees_to_rounding_in_float64(calls, batch, options, frozen):
    plain, x = freeze_norms(make_block(torch.float64, **options), frozen), make_tokens(batch, torch.float64)
    expected, found = step(plain, x), step(fuse(plain), x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert None not in calls


def test_parameters_that_want_no_gradient_get_none(calls):
    block, x = fuse(make_block(torch.float64)), make_tokens(2, torch.float64)
    whole = step(block, x)[3:]
    for i, parameter in enumerate(block.parameters()):
        parameter.requires_grad_(i % 3 == 0)
    for found, expected, parameter in zip(step(block, x)[3:], whole, block.parameters(), strict=False):
        assert found is None if not parameter.requires_grad else torch.equal(found, expected)
    for parameter in (*block.norm1.parameters(), *block.attn.parameters(), *block.norm2.parameters()):
        parameter.requires_grad_(False)
    block.leff.bn3.requires_grad_(True)
    block(x, GRID).sum().backward()  # nor does x want one
    torch.testing.assert_close(block.leff.bn3.bias.grad, x.new_full((24,), 40.0))
    assert None not in calls


def test_a_sum_that_only_one_result_enters_and_several_gradients_at_once():
    block, x = fuse(make_block(torch.float64)), make_tokens(2, torch.float64).requires_grad_()
    out, class_token = block.forward_with_class_token(x, GRID, False)
    assert torch.equal(torch.autograd.grad(class_token.sum(), x, retain_graph=True)[0].sum(), x.new_tensor(48.0))
    grads = torch.randn(3, *out.shape, dtype=out.dtype)
    together = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)[0]
    for grad, found in zip(grads, together, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(out, x, grad, retain_graph=True)[0])
    first = torch.autograd.grad(out.sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="is differentiable once"):
        first.sum().backward()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Adapted(nn.Module):
    """A layer with one of low rank beside it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.low = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.layer(x) + self.low(x)


def adapt(block, name):
    torch.manual_seed(3)
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, Adapted(block.get_submodule(name)))


def give_a_forward(module):
    plain = module.forward

    def forward(*arguments, **options):
        out = plain(*arguments, **options)
        return 1.5 * out if isinstance(out, torch.Tensor) else out

    module.forward = forward


LINEAR, LAYERS = (nn.Linear,), (nn.Linear, nn.Conv2d)
# What is done to a part, by its name in a block, and the classes of parts.
CHANGES = {
    "hook": (lambda b, n: b.get_submodule(n).register_forward_hook(lambda _, __, out: 1.5 * out), nn.Module),
    "hook ahead": (
        lambda b, n: b.get_submodule(n).register_forward_pre_hook(lambda _, xs: (1.1 * xs[0], *xs[1:])),
        LAYERS,
    ),
    "hook behind": (
        lambda b, n: b.get_submodule(n).register_full_backward_hook(lambda _, grads, __: tuple(2 * g for g in grads)),
        (*LAYERS, nn.LayerNorm, nn.BatchNorm2d),
    ),
    "forward": (lambda b, n: give_a_forward(b.get_submodule(n)), nn.Module),
    "parametrization": (
        lambda b, n: parametrize.register_parametrization(b.get_submodule(n), "weight", Doubled()),
        LAYERS,
    ),
    "pruning": (torch.no_grad()(lambda b, n: prune.l1_unstructured(b.get_submodule(n), "weight", 0.5)), LAYERS),
    "adapter": (adapt, LINEAR),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_a_part_is_followed(change):
    make, classes = CHANGES[change]
    parts = make_block(torch.float64).named_modules()
    # The block itself gives several results, as its residual norm does.
    names = [name for name, part in parts if isinstance(part, classes) and name not in ("", "add_norm")]
    for i, name in enumerate(names):
        plain, fused = make_block(torch.float64), make_block(torch.float64)
        make(plain, name)
        for do in (lambda b, n=name: make(b, n), fuse)[:: 1 if i % 2 else -1]:  # before fuse and behind it, by turns
            do(fused)
        x = make_tokens(2, torch.float64)
        found, expected = step(fused, x), step(plain, x)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_declines_where_someone_would_notice(calls):
    block, x = fuse(make_block(drop_path=0.2)), make_tokens()

    def declines():
        calls.clear()
        state = torch.get_rng_state()
        block(x, GRID)
        drawn = not torch.equal(torch.get_rng_state(), state)
        return calls in ([], [None]) and drawn  # by the operators, not by the call

    assert not declines()
    with torch.autocast("cpu", torch.float16):
        assert declines()
    for operator in ("add_norm", "linear", "attention", "leff"):
        with use_backend(f"{operator}=reference"):
            assert declines()
    for module in (block.norm1, block.attn, block.attn.proj, block.leff, block.leff.bn1, block.drop_path):
        handle = module.register_forward_hook(lambda *_: None)
        assert declines(), module
        handle.remove()
    block.attn.proj_drop.p = 0.5
    assert declines()
    block.attn.proj_drop.p = 0.0
    with torch.no_grad():
        assert declines()
    block.leff.bn1.__class__ = SyncBatchNorm2d
    assert not declines()  # one process
    block.attn.qkv.weight.data = block.attn.qkv.weight.data.t().contiguous().t()
    assert declines()
    parts = encoder_parts(block.eval().requires_grad_(False))
    assert encoder_training(x, parts, GRID) is None
    assert encoder_training(x.bfloat16().requires_grad_(), parts, GRID) is None
    assert encoder_training(x[:0].requires_grad_(), parts, GRID) is None
    assert encoder_training(x.requires_grad_(), None, GRID) is None
    assert encoder_training(x[:1].requires_grad_(), parts, GRID) is None  # the strided weight
