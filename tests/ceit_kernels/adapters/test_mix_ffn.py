"""Mix-FFN of SegFormer, GLPN and PVTv2, of transformers and of timm, through ``fuse``."""

import copy
import pickle
from functools import cache

import pytest
import torch
from support.adapters import FirstResult, assert_accurate_in_float32, assert_equal_in_float64, grown
from support.where import DEVICE
from timm.models.pvt_v2 import MlpWithDepthwiseConv, PyramidVisionTransformerV2
from torch import nn
from torch.nn.utils import parametrize, prune

from ceit_kernels import explain, freeze, fuse, unfuse, use_backend
from ceit_kernels.leff.activations import ACTIVATIONS, activation_name

BLOCKS = ("segformer", "glpn", "pvt_v2", "pvt_v2 linear", "timm", "timm linear")


@cache
def transformers_models():
    from transformers import GLPNConfig, PvtV2Config, SegformerConfig
    from transformers.models.glpn import modeling_glpn as glpn
    from transformers.models.pvt_v2 import modeling_pvt_v2 as pvt_v2
    from transformers.models.segformer import modeling_segformer as segformer

    mix_ffn = getattr(segformer, "SegformerMixMLP", None) or segformer.SegformerMixFFN
    return {
        "segformer": lambda **o: mix_ffn(SegformerConfig(**o), 12, 40, 20),
        "glpn": lambda **o: glpn.GLPNMixFFN(GLPNConfig(**o), 12, 40, 20),
        "pvt_v2": lambda **o: pvt_v2.PvtV2ConvFeedForwardNetwork(PvtV2Config(**o), 12, 40, 20),
        "pvt_v2 linear": lambda **o: pvt_v2.PvtV2ConvFeedForwardNetwork(
            PvtV2Config(linear_attention=True, **o), 12, 40
        ),
    }


def make_block(name, seed=0, dropout=0.0):
    if name.startswith("timm"):
        block = MlpWithDepthwiseConv(12, 40, 20, drop=dropout, extra_relu=name == "timm linear")
    else:
        block = transformers_models()[name](hidden_dropout_prob=dropout)
    return grown(block, seed)


def make_inputs(name, batch=2, height=5, width=7, seed=0):
    x = torch.randn(batch, height * width, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x, [height, width]) if name.startswith("timm") else (x, height, width)


blocks = pytest.mark.parametrize("name", BLOCKS)


@blocks
def test_a_fused_block_computes_what_the_plain_one_does(name):
    for size in ({}, {"batch": 1, "height": 1, "width": 13}):
        for training in (False, True):
            assert_equal_in_float64(make_block(name).train(training), make_inputs(name, **size))
    assert_accurate_in_float32(lambda draw: (make_block(name, draw), make_inputs(name, seed=draw)))


@blocks
def test_dropout_in_training_takes_the_plain_path(name):
    plain = make_block(name, dropout=0.5).train()
    fused, inputs = fuse(copy.deepcopy(plain)), make_inputs(name)
    assert "dropout" in fused.plain_reason()
    results = []
    for block in (plain, fused):
        torch.manual_seed(0)
        results.append(block(*inputs))
    torch.testing.assert_close(*results)
    with use_backend("leff=native"):
        fused.eval()(*inputs)


def tiny_models():
    from transformers import PvtV2Config, PvtV2ForImageClassification, SegformerConfig, SegformerForSemanticSegmentation

    sizes = {"hidden_sizes": [8, 12], "depths": [1, 2], "num_encoder_blocks": 2, "num_attention_heads": [1, 2]}
    lists = {"sr_ratios": [2, 1], "mlp_ratios": [4, 2], "patch_sizes": [7, 3], "strides": [4, 2], "num_labels": 5}
    options = {**sizes, **lists, "drop_path_rate": 0.0}
    segformer = SegformerConfig(**options, classifier_dropout_prob=0.0)
    timm_options = {"embed_dims": (8, 12), "depths": (1, 2), "num_heads": (1, 2), "sr_ratios": (2, 1), "num_classes": 5}
    return {
        "segformer": lambda: FirstResult(SegformerForSemanticSegmentation(segformer)),
        "pvt_v2": lambda: FirstResult(PvtV2ForImageClassification(PvtV2Config(**options))),
        "timm": lambda: PyramidVisionTransformerV2(**timm_options, mlp_ratios=(4, 2)),
        "timm linear": lambda: PyramidVisionTransformerV2(**timm_options, mlp_ratios=(4, 2), linear=True),
    }


@pytest.mark.parametrize("name", ["segformer", "pvt_v2", "timm", "timm linear"])
def test_a_whole_model_computes_fused_and_frozen_what_it_does_plain(name):
    torch.manual_seed(0)
    model = tiny_models()[name]().double()
    assert [row.backend for row in explain(fuse(copy.deepcopy(model))) if row.operator == "leff"] == ["native"] * 3
    for size in ((32, 48), (40, 24)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        for training in (False, True):
            assert_equal_in_float64(model.train(training), (x,))
        frozen = freeze(model.eval())
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-12)
    rows = [row for row in explain(frozen) if row.operator == "leff"]
    assert rows
    assert all(row.reason.startswith("frozen") for row in rows)


class Adapter(nn.Module):
    """What LoRA puts in the place of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.extra = layer, nn.Linear(layer.in_features, layer.out_features).double()

    def forward(self, x):
        return self.layer(x) + self.extra(x)


def hook(block, first):
    first.register_forward_hook(lambda module, inputs, out: 2 * out)


def hook_the_wrapper(block, first):
    block.dwconv.register_forward_hook(lambda module, inputs, out: 2 * out)


def prune_a_weight(block, first):
    prune.l1_unstructured(first, "weight", 0.5)


def parametrise(block, first):
    parametrize.register_parametrization(first, "weight", nn.Tanh())


def replace(block, first):
    torch.manual_seed(0)
    name = next(name for name, child in block.named_children() if child is first)
    setattr(block, name, Adapter(first))


def another_forward(block, first):
    block.dwconv.forward = lambda x, *size: x


def another_activation(block, first):
    name = next(name for name, child in block.named_children() if "act" in name)
    setattr(block, name, nn.Tanh())


def dilate(block, first):
    convolution = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
    convolution.padding, convolution.dilation = (2, 2), (2, 2)


CHANGES = (
    hook,
    hook_the_wrapper,
    prune_a_weight,
    parametrise,
    replace,
    another_forward,
    another_activation,
    dilate,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_done_to_a_fused_block_is_honoured(change):
    for name in ("segformer", "timm"):
        plain = make_block(name)
        for after in (False, True):
            fused = fuse(copy.deepcopy(plain)) if after else copy.deepcopy(plain)
            changed = copy.deepcopy(plain)
            for block in (changed, fused):
                change(block, next(m for m in block.children() if isinstance(m, nn.Linear)))
            inputs = make_inputs(name)
            expected, found = changed(*inputs), fuse(fused)(*inputs)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            assert (found - plain(*inputs)).abs().max() > 1e-3
            unfused = unfuse(fused)
            torch.testing.assert_close(unfused(*inputs), expected, rtol=0, atol=0)


def test_activations_of_transformers_are_those_that_they_were_made_with():
    from transformers.activations import ACT2FN, GELUActivation

    names = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    for theirs, ours in names.items():
        activation = ACT2FN[theirs]
        assert activation_name(activation) == ours
        torch.testing.assert_close(ACTIVATIONS[ours](x), activation(x), rtol=1e-12, atol=1e-12)
    changed = GELUActivation()
    changed.act = torch.tanh
    assert activation_name(changed) is None


@pytest.mark.kernels
@pytest.mark.parametrize("training", [False, True])
def test_the_block_on_a_gpu(training):
    block = make_block("timm linear").to(DEVICE).train(training)
    x, size = make_inputs("timm")
    assert_equal_in_float64(block, (x.to(DEVICE), size), "triton")


def test_a_scripted_block_is_the_plain_one():
    block = fuse(make_block("timm"), linear=False)
    x, size = make_inputs("timm")
    torch.testing.assert_close(torch.jit.script(block)(x, size), block(x, size), rtol=1e-10, atol=1e-10)


def test_a_fused_block_is_copied_and_pickled():
    block = fuse(make_block("timm"))
    for again in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(again) is type(block)
        torch.testing.assert_close(again(*make_inputs("timm")), block(*make_inputs("timm")), rtol=0, atol=0)


@blocks
@torch.no_grad()
def test_a_frozen_block_that_may_not_read_what_it_prepared_is_the_live_one(name):
    block = make_block(name).float().eval()
    x, *size = make_inputs(name)
    live, frozen = fuse(block), freeze(block)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x.float(), *size), live(x.float(), *size))


@torch.no_grad()
def test_an_adapter_that_a_frozen_block_gets_is_called():
    class Doubled(nn.Module):  # without a weight of its own
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return 2 * self.layer(x)

    block, inputs = make_block("timm").eval(), make_inputs("timm")
    frozen = freeze(block)
    for module in (block, frozen.model):
        module.fc1 = Doubled(module.fc1)
    torch.testing.assert_close(frozen(*inputs), block(*inputs), rtol=1e-10, atol=1e-10)


def test_a_fused_block_is_compiled_whole():
    block, inputs = fuse(make_block("segformer")), make_inputs("segformer")
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), block(*inputs), rtol=1e-10, atol=1e-10)
