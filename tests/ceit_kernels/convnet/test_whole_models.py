"""Frozen models with attention: they are one compiled call."""

import copy
import pickle

import pytest
import torch
import transformers
from support.accuracy import assert_as_accurate_over_draws
from support.adapters import grown
from support.small_models import efficientformer, pvt_v2, tiny_vit
from torch import nn
from transformers import SegformerConfig, SegformerModel

from ceit_kernels import explain, freeze, use_backend
from ceit_kernels.convnet import FrozenConvnet


class Maps(nn.Module):
    """SegFormer's last map."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).last_hidden_state


def segformer():
    sizes = {"num_attention_heads": [1, 2], "mlp_ratios": [2, 3], "patch_sizes": [7, 3], "strides": [4, 2]}
    lists = {"hidden_sizes": [8, 12], "depths": [1, 2], "num_encoder_blocks": 2, "sr_ratios": [2, 1]}
    return Maps(SegformerModel(SegformerConfig(**sizes, **lists)))


# In transformers 4 they are of other parts, and stay plain.
SEGFORMERS_STAGES = 0 if transformers.__version__.startswith("4.") else 2
# With the sizes of images that they take, and how many calls each is.
MODELS = {
    "EfficientFormerV2": (lambda: efficientformer(64, 128), [(64, 128)], 1),
    "EfficientFormerV2, larger": (lambda: efficientformer(128, 192), [(128, 192)], 1),
    "TinyViT": (tiny_vit, [(96, 48), (96, 192), (48, 48)], 1),
    "PVTv2": (pvt_v2, [(64, 96), (49, 70)], 1),
    "SegFormer": (segformer, [(64, 96), (49, 70)], SEGFORMERS_STAGES),
}
models = pytest.mark.parametrize("name", MODELS)


def make(name, draw=0):
    torch.manual_seed(draw)
    model = grown(MODELS[name][0](), draw)
    model.train(False)
    return model


def images(*size, draw=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)


def calls(frozen):
    """The modules that are one compiled call and compute it so."""
    found = [module for module in frozen.modules() if isinstance(module, FrozenConvnet)]
    return [module for module in found if module._prepacked.is_intact() and "attention" in module._prepacked.operators]


def run(frozen, x):
    with use_backend("leff=native,attention=native"):
        out = frozen(x)
    assert all(all(module._prepacked.fitting.values()) for module in calls(frozen))
    return out


@torch.no_grad()
@models
def test_computes_what_the_model_does(name):
    model = make(name)
    _, sizes, count = MODELS[name]
    frozen = freeze(model)
    assert len(calls(frozen)) == count
    for size in sizes:
        for batch in (1, 3):
            x = images(batch, 3, *size)
            for memory in (torch.contiguous_format, torch.channels_last):
                out = run(frozen, x.to(memory_format=memory))
                torch.testing.assert_close(out, model(x), rtol=1e-9, atol=1e-9)
    rows = [row for row in explain(frozen) if "attention" in row.reason]
    assert [row.backend for row in rows] == ["native"] * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["EfficientFormerV2", "TinyViT", "PVTv2"])
def test_is_as_accurate_as_the_model(name, dtype):
    def results(draw):
        model, x = make(name, draw).to(dtype), images(1, 3, *MODELS[name][1][0], draw=draw).to(dtype)
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            return [run(freeze(model), x)], [model(x)], [exact(x.double())]

    assert_as_accurate_over_draws([name], map(results, range(8)))


def attention_of(model):
    return next(module for module in model.modules() if type(module).__name__.endswith(("Attention", "Attention2d")))


def with_a_hook(model):
    attention_of(model).proj.register_forward_hook(lambda module, inputs, out: 2 * out)


def with_other_biases(model):
    attention = attention_of(model)
    biases = nn.Parameter(attention.attention_biases.detach() + attention.attention_bias_idxs.double()[0])
    attention._buffers.pop("attention_biases", None)
    attention.attention_biases, attention.attention_bias_cache = biases, {}


def with_another_scale(model):
    attention = attention_of(model)
    attention.scale, attention.fused_attn = 2.0, False


def with_another_norm(model):
    attention_of(model).norm = nn.Tanh()


def with_another_forward(model):
    attention_of(model).forward = torch.sin


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("EfficientFormerV2", with_a_hook),
        ("EfficientFormerV2", with_other_biases),
        ("EfficientFormerV2", with_another_scale),
        ("TinyViT", with_other_biases),
        ("TinyViT", with_another_norm),
        ("TinyViT", with_another_forward),
        ("PVTv2", with_another_scale),
    ],
)
def test_what_is_done_to_the_parts_is_not_ignored(name, change):
    model, x = make(name), images(1, 3, *MODELS[name][1][0])
    changed = copy.deepcopy(model)
    change(changed)
    expected = changed(x)
    assert (expected - model(x)).abs().max() > 1e-4
    torch.testing.assert_close(freeze(changed)(x), expected, rtol=1e-9, atol=1e-9)
    frozen = freeze(model)
    change(frozen.model)
    torch.testing.assert_close(frozen(x), expected, rtol=1e-9, atol=1e-9)
    assert not calls(frozen)


@torch.no_grad()
def test_images_that_windows_do_not_divide_and_other_backends_are_left_to_the_model():
    model = make("TinyViT")
    frozen, x = freeze(model), images(1, 3, 40, 56)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-9)
    assert not any(calls(frozen)[0]._prepacked.fitting.values())
    with use_backend("attention=reference"):
        assert not calls(freeze(model))
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-9)
    with pytest.raises((RuntimeError, ValueError)):
        freeze(make("EfficientFormerV2"))(images(1, 3, 96, 96))
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), frozen(x))


def test_another_attention_function_of_a_snapshots_config_is_not_ignored():
    frozen = freeze(make("SegFormer"))
    assert len(calls(frozen)) == SEGFORMERS_STAGES
    frozen.model.model.config._attn_implementation = "flex_attention"
    assert not calls(frozen)
