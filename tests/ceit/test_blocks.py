"""The encoder block's residual connections, and the last block, of which only the class token reaches the logits."""

import copy

import pytest
import torch
from support.accuracy import assert_as_accurate_over_draws
from timm.layers import DropPath
from torch import nn

from ceit import CeiT
from ceit.blocks import Block, LCABlock
from ceit_kernels import FusedLeFF, FusedPatchProjection, freeze, fuse, use_backend
from ceit_kernels.attention import Attention
from ceit_kernels.common import children
from ceit_kernels.lca import LCAAttention

SMALL = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
DROPPING = {"drop_path_rate": 0.2, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def model(request, images):
    """A model whose BatchNorms have seen images."""
    model = CeiT(**SMALL, **DROPPING).double()
    model(images)
    return (fuse(model) if request.param else model).eval()


@pytest.fixture
def last_tokens(model, monkeypatch):
    """A list that grows by the number of tokens that the last block makes."""
    made = []

    def watch(name):
        method = getattr(Block, name)

        def wrapper(self, *args):
            out = method(self, *args)
            if self is model.blocks[-1]:
                made.append(out[0].shape[1])
            return out

        monkeypatch.setattr(Block, name, wrapper)
        monkeypatch.setitem(children._own, (Block, name), wrapper)  # no stranger

    watch("_every_token")
    watch("class_token_halves")
    return made


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_both_halves_have_a_residual_connection(training, drop_path):
    block = Block(8, 2, drop_path=drop_path).train(training)
    x = torch.randn(4, 10, 8)
    torch.manual_seed(1)
    out = block(x)
    torch.manual_seed(1)
    middle = x + block.drop_path(block.attn(block.norm1(x)))
    assert torch.equal(out, middle + block.drop_path(block.leff(block.norm2(middle))))


def test_training_under_autocast_is_as_accurate_as_plain_pytorch_and_of_its_dtypes():
    block = Block(32, 2, qkv_bias=True)
    fused, exact = fuse(copy.deepcopy(block)), copy.deepcopy(block).double()

    def step(module, x, grad, autocast=True):
        module.zero_grad()
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(x, (4, 5))
        out.backward(grad.to(out.dtype))
        return [out, x.grad, *(p.grad for p in module.parameters())]

    def draws():
        for _ in range(24):
            x, grad = torch.randn(3, 21, 32), torch.randn(3, 21, 32)
            with use_backend("linear=native"):
                ours = step(fused, x, grad)
            yield ours, step(block, x, grad), step(exact, x.double(), grad.double(), autocast=False)

    names = ["out", "x", *(name for name, _ in block.named_parameters())]
    assert_as_accurate_over_draws(names, draws())


class Halved(nn.Module):
    def forward(self, x):
        return 0.5 * x


@pytest.mark.parametrize("drop_path", [Halved(), DropPath(0.5)], ids=["another module", "in training mode"])
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_both_halves_pass_drop_path_in_evaluation_mode(drop_path, enabled, fused):
    block, x = Block(8, 2).eval(), torch.randn(4, 10, 8)
    block.drop_path = drop_path
    torch.manual_seed(1)
    middle = x + block.drop_path(block.attn(block.norm1(x)))
    expected = middle + block.drop_path(block.leff(block.norm2(middle)))
    torch.manual_seed(1)
    with torch.set_grad_enabled(enabled):
        torch.testing.assert_close((fuse(block) if fused else block)(x), expected)


def test_the_last_block_makes_only_its_class_token_where_only_logits_are_wanted(model, images, last_tokens):
    expected = model(images).detach()
    with torch.no_grad():
        logits = model(images)
    with torch.inference_mode():
        assert torch.equal(model(images), logits)
    # The fused blocks may have run in one compiled call, which calls none of them.
    assert last_tokens in ([17, 1, 1], [17])
    assert last_tokens == [17, 1, 1] or isinstance(model.blocks[-1].leff, FusedLeFF)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, DROPPING, {"leff_with_bn": False}], ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_training_gives_what_the_whole_block_does(options, fused, frozen, images, monkeypatch):
    def step():
        torch.manual_seed(0)
        model = CeiT(**SMALL, **options).double()
        model.blocks[-1].leff.bn2.train(not frozen)
        model = fuse(model) if fused else model
        logits = model(images)
        logits.square().sum().backward()
        return logits, [p.grad for p in model.parameters()], list(model.buffers())

    short = step()
    monkeypatch.setattr(Block, "class_token_suffices", lambda self: False)
    # The fused block takes its class token's attention by itself, in sums of another order; dropout does not let it.
    tolerance = 1e-11 if fused and options is not DROPPING else 0
    torch.testing.assert_close(short, step(), rtol=tolerance, atol=tolerance)


def test_the_last_block_drops_the_paths_that_the_whole_block_drops(images, monkeypatch):
    def step():
        torch.manual_seed(0)
        model = fuse(CeiT(**SMALL, drop_path_rate=0.5).double())
        logits = model(images)
        logits.square().sum().backward()
        return logits, [p.grad for p in model.parameters()], list(model.buffers())

    short = step()
    monkeypatch.setattr(Block, "class_token_suffices", lambda self: False)
    torch.testing.assert_close(short, step(), rtol=1e-11, atol=1e-11)


def test_training_keeps_nothing_of_the_last_leff_for_backward(model, images, last_tokens):
    def saved():
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.shape[1:2] == (4 * 32,)  # hidden channels of an image
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images)
        return count

    per_block = saved() / 3
    model.train()
    assert 0 < saved() < 3 * per_block
    assert last_tokens == [17, 1]


def test_gradients_of_a_frozen_leff_stay_none(model, images):
    model.train()
    model.blocks[-1].leff.conv1.requires_grad_(False)
    model(images).sum().backward()
    assert model.blocks[-1].leff.conv1.weight.grad is None
    assert (model.blocks[-1].leff.conv2.weight.grad == 0).all()


def test_features_stay_complete(model, images):
    def features():
        model.global_pool = "token"
        of_token = model.forward_features(images), *model.forward_intermediates(images, stop_early=True)[1]
        model.global_pool = "avg"
        return *of_token, model(images)

    expected = features()
    with torch.no_grad():
        for found, whole in zip(features(), expected, strict=True):
            torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("part", ["", "norm1", "attn", "attn.qkv", "leff", "leff.conv1"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_sees_every_token(model, images, last_tokens, kind, part):
    seen = []
    model.train()
    hook = getattr(model.blocks[-1].get_submodule(part), f"register_{kind}_hook")(lambda *args: seen.append(args))
    model(images).sum().backward()
    hook.remove()
    model(images)
    # Fused LeFF does not call the convolutions.
    assert seen or part == "leff.conv1"
    assert last_tokens == [17, 1]


@torch.no_grad()
def test_statistics_are_taken_of_every_token(model, images, last_tokens):
    model.blocks[-1].leff.bn1.train()
    before = model.blocks[-1].leff.bn1.running_mean.clone()
    model(images)
    assert last_tokens == [1]
    assert model.blocks[-1].leff.bn1.num_batches_tracked == 2
    assert not torch.equal(model.blocks[-1].leff.bn1.running_mean, before)


@torch.no_grad()
def test_someone_elses_module_sees_every_token(model, images, last_tokens):
    model.blocks[-1].attn = nn.Identity()
    model(images)
    assert last_tokens == [17]


@pytest.mark.parametrize("freezing", [False, True])
def test_attention_of_another_kind_is_called(freezing):
    block = LCABlock(32, 2).eval()
    block.attn = Attention(32, 2)
    x = torch.randn(2, 5, 32)
    fused = (freeze if freezing else fuse)(copy.deepcopy(block))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), block(x))
    model = CeiT(**SMALL).eval()
    model.blocks[0].attn = LCAAttention(32, 2)
    fused = (freeze if freezing else fuse)(model)
    with torch.no_grad(), pytest.raises(ValueError, match="branch: expected shape"):  # of one token
        fused(torch.randn(2, 3, 64, 64))


@torch.no_grad()
def test_compiles_and_exports_with_the_class_token_alone(model, images):
    expected = model(images)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, rtol=1e-12, atol=1e-12)
    exported = torch.export.export(model, (images,))
    torch.testing.assert_close(exported.module()(images), expected, rtol=1e-12, atol=1e-12)
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    convolutions = sum("conv2d" in target or "i2t" in target for target in targets)
    leffs = sum("leff_inference" in target for target in targets)
    of_stem = 1 if isinstance(model.i2t.proj, FusedPatchProjection) else 2
    assert convolutions + 3 * leffs == of_stem + 3 * (len(model.blocks) - 1)


@pytest.mark.parametrize("fused", [False, True])
def test_sums_over_class_tokens_are_taken_with_the_norms_behind_them(images, fused):
    torch.manual_seed(0)
    model, seen = CeiT(**SMALL).double(), []
    model = fuse(model) if fused else model
    plain = copy.deepcopy(model)
    plain.lca.register_forward_hook(lambda *call: None)  # by which the block is called for itself
    model.lca.add_norm.register_forward_hook(lambda module, arguments, out: seen.append(arguments[2]))
    outs = [m(images) for m in (model, plain)]
    assert seen == [model.lca.norm1, model.lca.norm2, model.norm]
    grads = [torch.autograd.grad(outs[i].square().sum(), m.parameters()) for i, m in enumerate((model, plain))]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-10)


def test_a_hook_of_the_block_over_class_tokens_is_ahead_of_the_norm(model, images):
    seen = []
    model.lca.register_forward_hook(lambda module, arguments, out: torch.ones_like(out))
    model.norm.register_forward_hook(lambda module, arguments, out: seen.append(arguments[0]))
    model(images)
    assert [bool((x == 1).all()) for x in seen] == [True]
