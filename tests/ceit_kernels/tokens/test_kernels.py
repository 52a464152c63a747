"""The Triton kernels that put tokens together against plain PyTorch, and when a model takes them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import assert_as_accurate_over_draws
from support.where import ANY_SIZE_DTYPES, DEVICE, DTYPES, INTERPRETING, UNDER_TTSEM, autocast
from torch import nn
from torch.nn.utils import parametrize, prune

from ceit import CeiT
from ceit_kernels import fuse, use_backend
from ceit_kernels.tokens import embed_tokens, functional, join_layers
from ceit_kernels.tokens.op import column_sums_operator, join_tokens_operator
from ceit_kernels.tokens.reference import column_sums_reference, join_tokens_reference
from ceit_kernels.tokens.triton import MAX_TENSORS

pytestmark = pytest.mark.kernels


def make(*shapes, dtype=torch.float32, draw=0):
    generator = torch.Generator().manual_seed(draw)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


@torch.no_grad()
def check_join(batch, tokens, channels, dtype):
    """Images' tokens, and those of layers with something added to the last."""
    prefix, x, positions = make((1, 1, channels), (batch, tokens, channels), (1, 1 + tokens, channels), dtype=dtype)
    found = join_tokens_operator(positions, [prefix, x], None, True, "triton")
    assert torch.equal(found, join_tokens_reference(positions, [prefix, x]))
    *layers, added = make(*[(batch, 1, channels)] * (min(tokens, MAX_TENSORS) + 1), dtype=dtype)
    positions = positions[:, : len(layers)]
    found = join_tokens_operator(positions, layers, added, False, "triton")
    assert torch.equal(found, join_tokens_reference(positions, layers, added))


def check_sums(batch, tokens, channels, dtype):
    def draws():
        for draw in range(2):
            shapes = (batch, 1 + tokens, channels), (batch, channels), (batch, 3 * channels), (batch, 5)
            grads, kinds = make(*shapes, dtype=dtype, draw=draw), [dtype] * 6
            *found, rest = column_sums_operator(*grads, *kinds, "triton")
            *plain, expected = column_sums_reference(*grads, *kinds)
            assert torch.equal(rest, expected)
            exact = column_sums_reference(*(g.double() for g in grads), *[torch.float64] * 6)[:-1]
            if dtype == torch.float64:
                torch.testing.assert_close(found, exact)
                return
            yield found, plain, exact

    assert_as_accurate_over_draws(["positions", "first", "second", "third", "prefix"], draws())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_plain_pytorch(poisoned_memory, dtype):
    check_join(3, 20, 48, dtype)
    check_sums(3, 20, 48, dtype)


@settings(max_examples=4 if UNDER_TTSEM else 8, deadline=None)
@given(
    batch=st.integers(1, 70),
    tokens=st.integers(1, 18),
    channels=st.integers(1, 40),
    dtype=st.sampled_from(ANY_SIZE_DTYPES),
)
def test_agrees_at_any_size(batch, tokens, channels, dtype):
    check_join(batch, tokens, channels, dtype)
    check_sums(batch, tokens, channels, dtype)


def test_many_columns_are_taken_by_wide_tiles(poisoned_memory, monkeypatch):
    monkeypatch.setattr("ceit_kernels.tokens.triton.launch._MANY", 100)
    check_sums(35, 4, 48, torch.float32)


def test_takes_as_many_channels_as_promised(poisoned_memory):
    check_join(2, 2, 4096, torch.float32)


@pytest.mark.parametrize("wanted", range(6))
def test_what_is_not_wanted_is_not_made(wanted):
    grads = make((3, 4, 8), (3, 8), (3, 5), (3, 16))
    dtypes = [torch.float32 if i == wanted else None for i in range(6)]
    for found, expected in zip(
        column_sums_operator(*grads, *dtypes, "triton"), column_sums_reference(*grads, *dtypes), strict=True
    ):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected)


def test_every_dtype_is_promoted_as_by_plain_pytorch():
    prefix, x, positions = make((1, 1, 16), (2, 3, 16), (1, 4, 16))
    x = x.half().requires_grad_()
    prefix.requires_grad_()
    with use_backend("add_norm=triton"):
        found = embed_tokens(prefix, x, positions)
    expected = join_tokens_reference(positions, [prefix, x])
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(out.sin().sum(), [prefix, x]) for out in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_inputs_may_lie_in_memory_anyhow():
    prefix, x, positions = make((1, 16, 1), (2, 16, 3), (16, 4, 1))
    tensors = prefix.transpose(1, 2), x.transpose(1, 2), positions.permute(2, 1, 0)
    with use_backend("add_norm=triton"):
        found = embed_tokens(*tensors)
    assert torch.equal(found, join_tokens_reference(tensors[2], tensors[:2]))


def test_what_does_not_fit_is_left_to_plain_pytorch():
    prefix, x, positions, token = make((1, 1, 16), (2, 3, 16), (1, 4, 16), (2, 1, 16))
    with use_backend("add_norm=triton"):
        assert embed_tokens(prefix, x, positions[:, :3]) is None
        assert embed_tokens(prefix[..., :8], x, positions) is None
        assert embed_tokens(prefix, x[:0], positions) is None
        assert join_layers([token] * 4, None, positions) is not None
        assert join_layers([token] * 4, token.half(), positions) is None
        assert join_layers([token] * (MAX_TENSORS + 1), None, positions[:, :1].expand(1, MAX_TENSORS + 1, 16)) is None
    with use_backend("add_norm=reference"):
        assert embed_tokens(prefix, x, positions) is None


@pytest.mark.kernels(ttsem=False)
def test_opcheck_of_the_operators_which_autocast_leaves_alone():
    prefix, x, positions, token, added = make((1, 1, 16), (2, 3, 16), (1, 4, 16), (2, 1, 16), (2, 1, 16))
    join, sums = torch.ops.ceit.join_tokens.default, torch.ops.ceit.column_sums.default
    torch.library.opcheck(join, (positions, [prefix, x], None, True, "triton"))
    torch.library.opcheck(
        join, (positions, [token, token.clone(), token.clone(), token.clone()], added, False, "triton")
    )
    kinds = torch.float32, None, torch.float64, None, torch.float32, torch.float16
    torch.library.opcheck(sums, (x, None, token[:, 0], None, *kinds, "triton"))
    with torch.autocast("cpu", torch.bfloat16):
        assert join(positions, [prefix, x], None, True, "triton").dtype == torch.float32


@pytest.mark.kernels(ttsem=False)
def test_wrong_arguments_of_the_operators_are_named():
    prefix, x, positions = make((1, 1, 16), (2, 3, 16), (1, 4, 16))
    for tokens, added, shared, message in (
        ([], None, False, "tokens: expected from 1 to 4 tensors, got 0"),
        ([prefix] * 3, None, True, "expected two tensors, the first shared by all images, got 3"),
        ([prefix, x[:, :2]], None, True, r"tokens\[1\]: expected shape \(2, 3, 16\)"),
        ([prefix, x], x[:1], True, r"added: expected shape \(2, 3, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.ceit.join_tokens(positions, tokens, added, shared, "triton")
    with pytest.raises(ValueError, match="dtype1: expected None where rows1 is None"):
        torch.ops.ceit.column_sums(x, None, None, None, None, torch.float32, None, None, None, None, "triton")


SMALL = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


def make_model(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = fuse(CeiT(**SMALL | options)).to(DEVICE, dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model, torch.randn(3, 3, 32, 32).to(DEVICE, dtype)


@pytest.fixture
def sums(monkeypatch):
    """Of each launch of sums, how many of positions and biases it takes."""
    found = []
    forward = column_sums_operator.forward

    def noted(*arguments):
        found.append(sum(dtype is not None for dtype in arguments[4:8]))
        return forward(*arguments)

    monkeypatch.setattr(column_sums_operator, "forward", noted)
    return found


def step(backend, model, images, **options):
    model.zero_grad()
    torch.manual_seed(1)
    with use_backend(f"reference,linear=auto,lca=auto,add_norm={backend}"):
        out = model(images)
    (out.float() * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


def assert_same_step(model, images, **tolerances):
    tolerances = tolerances or {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(*(step(backend, model, images) for backend in ("triton", "reference")), **tolerances)


@pytest.mark.kernels(ttsem=False)
@pytest.mark.parametrize(
    "options", [{}, {"pos_drop_rate": 0.3}, {"proj_drop_rate": 0.2}, {"depth": 1}, {"dynamic_img_size": True}], ids=str
)
def test_a_model_takes_the_step_of_plain_pytorch(sums, options):
    assert_same_step(*make_model(**options))
    assert sums == [4, 1]


@pytest.mark.kernels(ttsem=False)
def test_autocast_gives_every_parameter_a_gradient_of_its_own_dtype(sums):
    with autocast(torch.float16 if INTERPRETING else torch.bfloat16):
        assert_same_step(*make_model(), rtol=0.1, atol=0.1)
    assert sums == [4, 1]


def freeze(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def own_forward(layer):
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, 3 * layer.bias)


OF_LINEARS = {
    "class": lambda layer: setattr(layer, "__class__", Twice),
    "forward hook": lambda layer: layer.register_forward_hook(lambda m, args, out: 2 * out),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda m, grads, outs: (2 * grads[0],)),
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "bias", nn.Tanh()),
    "pruning": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    "forward": own_forward,
    "no bias": lambda layer: setattr(layer, "bias", None),
    "frozen bias": lambda layer: layer.bias.requires_grad_(False),
}


@pytest.mark.kernels(ttsem=False)
@pytest.mark.parametrize("name", ["attn.proj", "feedforward.fc1", "feedforward.fc2"])
@pytest.mark.parametrize("change", OF_LINEARS.values(), ids=OF_LINEARS)
def test_a_layer_that_is_no_plain_linear_layer_is_called(sums, change, name):
    model, images = make_model()
    change(model.lca.get_submodule(name))
    assert_same_step(model, images)
    assert sums == [3, 1]


def hook(module):
    module.register_forward_hook(lambda m, args, out: 2 * out)


OF_MODELS = {
    "hook of LCA": (lambda model: hook(model.lca), [1]),
    "hook of attention": (lambda model: hook(model.lca.attn), [1, 1]),
    "hook of the MLP": (lambda model: hook(model.lca.feedforward), [1, 1]),
    "hook of the activation": (lambda model: hook(model.lca.feedforward.act), [4, 1]),
    "hook of a dropout": (lambda model: hook(model.lca.attn.proj_drop), [4, 1]),
    "hook of the stem": (lambda model: hook(model.i2t), [4, 1]),
    "hook behind positions": (lambda model: hook(model.pos_drop), [4, 1]),
    "hook of the first norm": (lambda model: model.blocks[0].add_norm.register_forward_hook(lambda *call: None), [4]),
    "hook of the last block": (lambda model: hook(model.blocks[-1]), [4, 1]),
    "frozen positions": (lambda model: freeze(model, "pos_embed", "pos_layer_embed"), [3, 0]),
    "frozen class token": (lambda model: freeze(model, "cls_token"), [4, 1]),
}


@pytest.mark.kernels(ttsem=False)
@pytest.mark.parametrize(("change", "expected"), OF_MODELS.values(), ids=OF_MODELS)
def test_what_was_done_to_a_model_is_honoured(sums, change, expected):
    model, images = make_model()
    change(model)
    assert_same_step(model, images)
    assert sums == expected


@pytest.mark.kernels(ttsem=False)
def test_a_head_that_learns_alone_takes_nothing_back_through_the_model(sums):
    model, images = make_model()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model.lca.feedforward.requires_grad_(True)
    assert_same_step(model, images)
    assert not sums


@pytest.mark.kernels(ttsem=False)
def test_second_derivatives_and_batches_of_gradients_are_those_of_plain_pytorch():
    prefix, x, positions = make((1, 1, 8), (2, 3, 8), (1, 4, 8), dtype=torch.float64)
    tensors = [tensor.requires_grad_() for tensor in (prefix, x, positions)]
    found = []
    for backend in ("triton", "reference"):
        with use_backend(f"add_norm={backend}"):
            out = embed_tokens(*tensors)
        out = join_tokens_reference(positions, [prefix, x]) if out is None else out
        first = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors, retain_graph=True))
        rows = torch.eye(3, dtype=out.dtype, device=out.device)
        found.append(torch.autograd.grad(out[0, 0, :3], tensors, rows, is_grads_batched=True))
    torch.testing.assert_close(found[:2], found[2:])


@pytest.mark.kernels(ttsem=False)
def test_transforms_and_graphs_are_left_to_plain_pytorch(monkeypatch):
    model, images = make_model(torch.float64)
    model.eval()
    called = []
    monkeypatch.setattr(functional, "_joined", lambda *arguments: called.append(arguments))
    with use_backend("reference,add_norm=auto"):
        torch.func.grad(lambda x: torch.func.functional_call(model, dict(model.named_parameters()), x).sum())(images)
        torch.compile(model, backend="eager")(images)
    assert not called
