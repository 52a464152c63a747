import pytest
import timm
import torch
from torch import nn

import ceit
from ceit.layers import AddNorm, Attention, Image2Tokens, LCAAttention, LocallyEnhancedFeedForward
from ceit_kernels import (
    FusedAddNorm,
    FusedAttention,
    FusedImage2Tokens,
    FusedLCAAttention,
    FusedLeFF,
    FusedLinear,
    fast_operators,
    fuse,
    unfuse,
)
from ceit_kernels.operators import OPERATORS

NAME = "ceit_tiny_patch16_224"
CONFIGURATIONS = {
    "ceit_tiny_patch16_224": (224, 192, 3),
    "ceit_small_patch16_224": (224, 384, 6),
    "ceit_base_patch16_224": (224, 768, 12),
    "ceit_tiny_patch16_384": (384, 192, 3),
    "ceit_small_patch16_384": (384, 384, 6),
}
SMALL = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
PLAIN = {
    "leff": LocallyEnhancedFeedForward,
    "lca": LCAAttention,
    "i2t": Image2Tokens,
    "add_norm": AddNorm,
    "linear": nn.Linear,
    "attention": Attention,
}
FUSED = {
    "leff": FusedLeFF,
    "lca": FusedLCAAttention,
    "i2t": FusedImage2Tokens,
    "add_norm": FusedAddNorm,
    "linear": FusedLinear,
    "attention": FusedAttention,
}


def kinds(model):
    """The operators whose modules are fused; those of one operator must be of one kind."""
    found = {name: {type(m) for m in model.modules() if type(m) in (PLAIN[name], FUSED[name])} for name in PLAIN}
    assert all(len(types) == 1 for types in found.values())
    return {name for name, types in found.items() if types == {FUSED[name]}}


def test_the_five_models_are_listed_here_and_by_timm():
    names = ceit.list_models()
    assert names == [
        "ceit_tiny_patch16_224",
        "ceit_small_patch16_224",
        "ceit_base_patch16_224",
        "ceit_tiny_patch16_384",
        "ceit_small_patch16_384",
    ]
    assert set(names) == set(timm.list_models("ceit_*"))


@pytest.mark.parametrize(
    ("fused", "expected"),
    [
        (True, set(OPERATORS)),
        (False, set()),
        ("auto", fast_operators()),
        (["lca"], {"lca"}),
        ({"leff", "i2t"}, {"leff", "i2t"}),
        ((), set()),
    ],
    ids=["all", "none", "auto", "a list", "a set", "an empty tuple"],
)
@pytest.mark.parametrize("create", [ceit.create_model, timm.create_model])
def test_fused_chooses_the_operators(create, fused, expected):
    assert kinds(create(NAME, fused=fused, **SMALL)) == expected


def test_fused_is_auto_here_and_off_in_timm():
    assert kinds(ceit.create_model(NAME, **SMALL)) == fast_operators()
    assert kinds(timm.create_model(NAME, **SMALL)) == set()


@pytest.mark.parametrize("fused", ["all", "lca", ["lca", "ffn"], 1, 0.5], ids=str)
@pytest.mark.parametrize("create", [ceit.create_model, timm.create_model])
def test_another_fused_is_refused(create, fused):
    message = "fused: expected True, .* a collection of leff, lca, i2t, add_norm, linear, attention, got"
    with pytest.raises(ValueError, match=message):
        create(NAME, fused=fused, **SMALL)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"leff_with_bn": False, "qkv_bias": False, "in_chans": 1}], ids=str)
def test_fused_and_plain_agree_and_share_state(options, training):
    torch.manual_seed(0)
    model = ceit.create_model(NAME, fused=False, **SMALL, **options).double().train(training)
    with torch.no_grad():
        model.pos_layer_embed.normal_()
    images = torch.randn(2, model.in_chans, 64, 64, dtype=torch.float64)
    names, state = list(model.state_dict()), {name: t.clone() for name, t in model.state_dict().items()}

    def run():
        model.load_state_dict(state)
        model.zero_grad()
        logits = model(images)
        logits.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        return {"logits": logits, **gradients}, dict(model.state_dict())

    plain = run()
    fuse(model)
    assert list(model.state_dict()) == names
    fused = run()
    torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)
    assert kinds(unfuse(model)) == set()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ceit_tiny_patch16_256", "unknown model 'ceit_tiny_patch16_256'; did you mean ceit_tiny_patch16_224 or"),
        ("resnet50", "unknown model 'resnet50'; available: ceit_tiny_patch16_224, ceit_small_patch16_224"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(name, message):
    with pytest.raises(ValueError, match=message):
        ceit.create_model(name)


@pytest.mark.parametrize("create", [ceit.create_model, timm.create_model])
def test_pretrained_is_refused_before_anything_is_built(create, monkeypatch):
    monkeypatch.setattr(ceit.CeiT, "__init__", lambda self, **kwargs: pytest.fail("built"))
    with pytest.raises(ValueError, match=f"no weights are published for {NAME}; give a file of weights as checkpoint="):
        create(NAME, pretrained=True)


def test_pretrained_takes_weights_that_the_caller_has(tmp_path):
    torch.manual_seed(0)
    source = ceit.create_model(NAME, **SMALL)
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    overlay = {"file": str(path), "num_classes": 5}
    model = ceit.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, "img_size": 96})
    assert torch.equal(model.head.weight, source.head.weight)
    assert model.pos_embed.shape == (1, 1 + 36, 32)


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize("create", [ceit.create_model, timm.create_model])
def test_checkpoint_is_loaded_before_fusing(create, features_only, tmp_path):
    torch.manual_seed(0)
    source = ceit.create_model(NAME, fused=False, **SMALL)
    path = tmp_path / "weights.pth"
    torch.save({"model": source.state_dict()}, path)
    options = {"features_only": True, "out_indices": (1,)} if features_only else {}
    model = create(NAME, checkpoint=path, fused=["leff"], **SMALL, **options).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = source.eval()(images)
    if features_only:
        expected = source.forward_intermediates(images, [1], intermediates_only=True)
    torch.testing.assert_close(model(images), expected)


def test_models_are_modules_with_the_cfg_of_their_name():
    model = ceit.create_model("ceit_tiny_patch16_384", **SMALL)
    assert isinstance(model, nn.Module)
    assert model.default_cfg["architecture"] == "ceit_tiny_patch16_384"


@pytest.mark.parametrize("name", ceit.list_models())
def test_every_name_has_its_size_width_depth_and_heads(name):
    size, width, heads = CONFIGURATIONS[name]
    with torch.device("meta"):
        model = ceit.create_model(name, fused=False)
    assert (model.i2t.img_size, model.grid_size) == ((size, size), (size // 16, size // 16))
    assert (model.embed_dim, len(model.blocks), model.num_classes) == (width, 12, 1000)
    assert {module.num_heads for module in model.modules() if hasattr(module, "num_heads")} == {heads}
    assert model.pretrained_cfg["input_size"] == (3, size, size)
