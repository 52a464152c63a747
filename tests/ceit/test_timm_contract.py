"""What timm asks of a model, after the generic tests that timm runs on its own models."""

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureInfo, group_parameters
from timm.optim import create_optimizer_v2

import ceit

NAME = "ceit_tiny_patch16_224"
SMALL = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(**kwargs):
    return timm.create_model(NAME, **{**SMALL, **kwargs}).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("name", ceit.list_models())
def test_model_forward(name):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        outputs = model(torch.randn(1, *model.default_cfg["input_size"]))
    assert outputs.shape == (1, 1000)
    assert outputs.isfinite().all()


def test_model_backward():
    model = timm.create_model(NAME, num_classes=42).train()
    outputs = model(torch.randn(2, 3, 224, 224))
    outputs.mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert outputs.shape == (2, 42)
    assert outputs.isfinite().all()


@pytest.mark.parametrize("name", ceit.list_models())
def test_model_default_cfgs(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg, parameters = model.default_cfg, model.state_dict()
    assert cfg["classifier"] + ".weight" in parameters
    assert cfg["first_conv"] + ".weight" in parameters
    assert cfg["input_size"] == (3, *model.i2t.img_size)
    assert (cfg["mean"], cfg["std"]) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert (cfg["crop_pct"], cfg["interpolation"], cfg["fixed_input_size"]) == (0.875, "bicubic", True)
    assert cfg["num_classes"] == model.num_classes == 1000
    assert cfg["license"] == "apache-2.0"


def test_model_features_then_head(images):
    model = small(num_classes=5)
    features = model.forward_features(images)
    assert features.shape == (2, 17, model.num_features)
    assert model.head_hidden_size == model.num_features == 32
    assert model.forward_head(features, pre_logits=True).shape == (2, 32)
    assert model.forward_head(features).shape == (2, 5)

    model.reset_classifier(0)
    assert model(images).shape == (2, 32)
    assert torch.equal(model(images), features[:, 0])
    model.reset_classifier(0, "")
    assert torch.equal(model(images), features)
    model.reset_classifier(6, "avg")
    assert model(images).shape == (2, 6)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 1:].mean(dim=1))
    assert model.get_classifier() is model.head
    assert model.head.out_features == model.num_classes == 6


def test_reset_classifier_keeps_the_type_of_the_model_and_refuses_other_pools():
    model = small().double()
    model.reset_classifier(3)
    assert (model.head.in_features, model.head.out_features) == (model.embed_dim, 3)
    assert model.head.weight.dtype == torch.float64
    assert not model.head.training
    with pytest.raises(ValueError, match="global_pool: expected 'token', 'avg' or '', got 'map'"):
        model.reset_classifier(4, "map")
    assert model.num_classes == 3


def test_model_feature_info():
    info = FeatureInfo(small().feature_info, 4)
    assert info.channels() == [32] * 4
    assert info.reduction() == [16] * 4
    assert info.module_name() == [f"blocks.{i}" for i in range(4)]


@pytest.mark.parametrize(("output_fmt", "shape"), [("NCHW", (2, 32, 4, 6)), ("NLC", (2, 24, 32))])
def test_model_forward_intermediates(output_fmt, shape):
    model = small(img_size=(64, 96))
    images = torch.randn(2, 3, 64, 96)
    output, intermediates = model.forward_intermediates(images, output_fmt=output_fmt)
    assert torch.equal(output, model.forward_features(images))
    assert [tuple(y.shape) for y in intermediates] == [shape] * 4


def test_intermediates_are_the_blocks_patch_tokens_and_class_tokens(images):
    model = small()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    taken = model.forward_intermediates(
        images, indices=[1, -1], return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    for (patches, prefix), tokens in zip(taken, (seen[1], seen[3]), strict=True):
        assert torch.equal(torch.cat((prefix, patches), dim=1), model.norm(tokens))
    (as_map,) = model.forward_intermediates(images, indices=1, intermediates_only=True)
    assert torch.equal(as_map.flatten(2).transpose(1, 2), seen[3][:, 1:])


def test_stop_early_leaves_out_the_blocks_behind(images):
    model = small()
    ran = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, output, index=index: ran.append(index))
    output, _ = model.forward_intermediates(images, indices=[1], stop_early=True)
    assert ran == [0, 1]
    assert output.shape == (2, 17, 32)


def test_forward_intermediates_refuses_other_formats(images):
    with pytest.raises(ValueError, match="output_fmt: expected 'NCHW' or 'NLC', got 'NHWC'"):
        small().forward_intermediates(images, output_fmt="NHWC")


@pytest.mark.parametrize("fused", [False, True])
def test_features_only_gives_the_intermediates_of_the_whole_model(images, fused):
    torch.manual_seed(0)
    model = small()
    torch.manual_seed(0)
    backbone = small(features_only=True, out_indices=(0, 2), fused=fused)
    assert backbone.feature_info.channels() == [32, 32]
    assert backbone.feature_info.reduction() == [16, 16]
    expected = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    for features, reference in zip(backbone(images), expected, strict=True):
        torch.testing.assert_close(features, reference)
    names = list(backbone.state_dict())
    assert not [name for name in names if "lca" in name or "head" in name or "blocks.3" in name or ".norm." in name]


def test_features_only_gives_three_levels_unless_told():
    assert len(small(features_only=True).feature_info.channels()) == 3


def test_pruning_may_keep_norm_and_head(images):
    model = small()
    expected, _ = model.forward_intermediates(images, indices=[1], stop_early=True)
    assert model.prune_intermediate_layers([1], prune_head=False) == [1]
    assert len(model.blocks) == 2
    assert torch.equal(model.forward_features(images), expected)
    model.prune_intermediate_layers(1)
    tokens = model.forward_features(images)
    assert torch.equal(model(images), tokens)
    assert tokens.shape == (2, 17, 32)


@pytest.mark.skipif(not hasattr(timm.models, "get_model_input_config"), reason="this timm does not follow the size")
def test_set_input_size_is_followed_by_timms_input_configuration():
    model = small()
    model.set_input_size((96, 64))
    assert timm.models.get_model_input_config(model)["input_size"] == (3, 96, 64)


def test_group_matcher_orders_stem_blocks_lca_and_head():
    model = small()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert len(groups) == len(list(model.parameters()))
    assert {groups[name] for name in ("cls_token", "pos_embed", "i2t.backbone.conv.weight", "i2t.proj.bias")} == {0}
    assert [groups[f"blocks.{i}.norm1.weight"] for i in range(4)] == [1, 2, 3, 4]
    assert {groups[name] for name in ("pos_layer_embed", "lca.attn.qkv.bias", "norm.weight")} == {5}
    assert groups["head.weight"] == 6


def test_no_weight_decay_names_parameters():
    model = small()
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_an_optimizer_with_layer_decay_covers_every_parameter():
    model = small()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
