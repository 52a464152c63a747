"""Attention of other libraries' models: at inference by the kernel, otherwise as it was."""

import copy
import functools

import pytest
import torch
import transformers
from support.accuracy import assert_as_accurate_over_draws
from support.adapters import grown
from timm.models import pvt_v2, tiny_vit
from transformers import SegformerConfig, SegformerModel

from ceit_kernels import BackendError, explain, freeze, fuse, use_backend

# With what is called beside the tokens.
MODULES = {
    "TinyViT": (lambda: tiny_vit.Attention(24, 8, 3, attn_ratio=1, resolution=(7, 9)), (2, 63, 24), ()),
    "PVTv2": (lambda: pvt_v2.Attention(24, 3, sr_ratio=2), (2, 8 * 14, 24), ([8, 14],)),
    "PVTv2, not reduced": (lambda: pvt_v2.Attention(24, 2, qkv_bias=False), (3, 35, 24), ([5, 7],)),
    "PVTv2, linear": (lambda: pvt_v2.Attention(24, 4, linear_attn=True), (1, 16 * 9, 24), ([16, 9],)),
}
modules = pytest.mark.parametrize("name", MODULES)


def make(name, draw=0, dtype=torch.float64):
    make_module, size, arguments = MODULES[name]
    x = torch.randn(size, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)
    module = grown(make_module(), draw)
    module.train(False)  # whose result is None in TinyViT
    return module.to(dtype), (x.to(dtype), *arguments)


def fused(module):
    return fuse(copy.deepcopy(module))


def of_queries(module, q, k, v, mask, **options):
    """An attention function of a user's."""
    return (2 * q).transpose(1, 2), None


@torch.no_grad()
@modules
def test_computes_what_the_module_does(name):
    module, inputs = make(name)
    with use_backend("attention=native"):
        torch.testing.assert_close(fused(module)(*inputs), module(*inputs), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(freeze(module)(*inputs), module(*inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@modules
def test_is_as_accurate_as_the_module(name, dtype):
    def results(draw):
        module, inputs = make(name, draw, dtype)
        exact = copy.deepcopy(module).double()
        with torch.no_grad(), use_backend("attention=native"):
            return [fused(module)(*inputs)], [module(*inputs)], [exact(inputs[0].double(), *inputs[1:])]

    assert_as_accurate_over_draws([name], map(results, range(8)))


@modules
def test_training_is_the_modules_own(name):
    module, inputs = make(name)
    trained = fused(module)
    for each in (module, trained):
        each.train()
    out = trained(*inputs)
    assert torch.equal(out, module(*inputs))
    assert out.requires_grad
    with use_backend("attention=native"), pytest.raises(BackendError, match="gradient"):
        fused(make(name)[0])(*inputs)


@torch.no_grad()
@modules
def test_its_parts_are_called(name):
    module, inputs = make(name)
    module.proj.register_forward_hook(lambda part, given, out: 2 * out)
    torch.testing.assert_close(fused(module)(*inputs), module(*inputs), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(freeze(module)(*inputs), module(*inputs), rtol=1e-10, atol=1e-10)
    assert {row.operator: row.backend for row in explain(freeze(module))}["linear"] == "native"


@modules
def test_what_a_child_adds_gets_its_gradient(name):
    """A hook or an adapter whose parameters are none of the module's."""
    module, inputs = make(name)
    module.requires_grad_(False)
    gradients = []
    for each in (module, fused(module)):
        added = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        projection = each.qkv if name == "TinyViT" else each.q
        projection.register_forward_hook(lambda part, given, out, added=added: out + added)
        each(*inputs).square().sum().backward()
        gradients.append(added.grad)
    with use_backend("attention=native"), pytest.raises(BackendError, match="a child gives tensors that want"):
        each(*inputs)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_what_the_kernel_lacks_is_left_to_the_module():
    module, inputs = make("TinyViT")
    module.fused_attn = False
    wide = grown(tiny_vit.Attention(24, 8, 3, attn_ratio=2, resolution=(7, 9)))
    wide.train(False)
    for plain, reason in (
        (module, "it does not call PyTorch's fused attention"),
        (wide, "values have other channels than keys"),
    ):
        torch.testing.assert_close(fused(plain)(*inputs), plain(*inputs), rtol=1e-10, atol=1e-10)
        assert explain(fused(plain))[0].reason == reason


def test_what_a_call_has_cached_may_be_frozen():
    module, inputs = make("TinyViT")
    expected = module(*inputs)  # leaves biases with a history
    torch.testing.assert_close(freeze(module)(*inputs), expected.detach(), rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="whose attention is plain")
@pytest.mark.parametrize("change", ["is_causal", "a function of the user's", "a wrapped function", "eager"])
def test_another_attention_of_segformer_is_called(change, monkeypatch):
    from transformers.models.segformer import modeling_segformer as library

    implementation = "eager" if change == "eager" else "sdpa"
    config = SegformerConfig(attn_implementation=implementation)
    module = grown(library.SegformerAttention(config, 24, 3, 1)).eval()
    x = torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if change == "is_causal":
        module.is_causal = True
    elif change == "eager":
        monkeypatch.setattr(library, "eager_attention_forward", of_queries)
    else:
        own = library.ALL_ATTENTION_FUNCTIONS["sdpa"]
        function = functools.wraps(own)(of_queries) if change == "a wrapped function" else of_queries
        monkeypatch.setitem(library.ALL_ATTENTION_FUNCTIONS, "sdpa", function)
    assert torch.equal(fused(module)(x, 4, 5)[0], module(x, 4, 5)[0])
    torch.testing.assert_close(freeze(module)(x, 4, 5)[0], module(x, 4, 5)[0], rtol=1e-10, atol=1e-10)
    if change != "is_causal":  # which keys of a smaller image do not go with
        sizes = {"depths": [1] * 4, "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4]}
        config = SegformerConfig(**sizes, attn_implementation=implementation)
        model, images = grown(SegformerModel(config)).eval(), torch.ones(1, 3, 64, 64, dtype=torch.float64)
        expected = model(images).last_hidden_state
        torch.testing.assert_close(freeze(model)(images).last_hidden_state, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_segformers_whole_encoder():
    config = SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4], image_size=64
    )
    model = grown(SegformerModel(config)).eval()
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = model(x).last_hidden_state
    with use_backend("attention=native"):
        for made in (fused(model), freeze(model)):
            torch.testing.assert_close(made(x).last_hidden_state, expected, rtol=1e-9, atol=1e-9)
    by = {row.plain_class: row.backend for row in explain(fused(model)) if row.operator == "attention"}
    # That of transformers 4 has other parts.
    assert by == {"SegformerAttention": "plain" if transformers.__version__.startswith("4.") else "native"}
