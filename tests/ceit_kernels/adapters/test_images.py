"""The inverted residual blocks of timm and torchvision, through ``fuse``."""

import copy
from functools import partial

import pytest
import timm
import torch
from support.adapters import assert_accurate_in_float32, assert_equal_in_float64, fused_names, grown
from support.where import DEVICE
from timm.layers import get_act_layer
from timm.models import byobnet, efficientvit_mit, tiny_vit
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite, UniversalInvertedResidual
from timm.models.efficientformer_v2 import ConvMlpWithNorm
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models import mnasnet, mobilenetv2, mobilenetv3

from ceit_kernels import BackendError, explain, freeze, fuse, use_backend

HARDSWISH, GELU = get_act_layer("hard_swish"), get_act_layer("gelu")


def mobile_vit(**options):
    layers = byobnet.LayerFn(act=nn.SiLU, conv_norm_act=partial(byobnet.ConvNormAct, act_layer=nn.SiLU))
    return byobnet.BottleneckBlock(12, 12, bottle_ratio=3.0, group_size=1, bottle_in=True, layers=layers, **options)


def mobilenet_v3():
    config = mobilenetv3.InvertedResidualConfig(12, 5, 36, 12, False, "HS", 1, 1, 1.0)
    config.input_channels, config.expanded_channels, config.out_channels = 12, 36, 12
    return mobilenetv3.InvertedResidual(config, nn.BatchNorm2d)


# Of 12 channels.
BLOCKS = {
    "EfficientFormerV2": lambda: ConvMlpWithNorm(12, 40, 20, act_layer=GELU, mid_conv=True),
    "TinyViT": lambda **o: tiny_vit.MBConv(12, 12, 3.0, nn.GELU, **{"drop_path": 0.0, **o}),
    "MobileNetV2": lambda **o: InvertedResidual(12, 12, exp_ratio=3, act_layer=nn.ReLU6, **o),
    "MobileNetV3": lambda: InvertedResidual(12, 20, 5, exp_ratio=3, act_layer=HARDSWISH),
    "MobileNetV4": lambda: UniversalInvertedResidual(12, 12, exp_ratio=3, layer_scale_init_value=None),
    "EfficientNet": lambda: InvertedResidual(12, 12, 5, exp_ratio=3, act_layer=nn.SiLU),
    "MobileViT": lambda: mobile_vit(linear_out=True),
    "a bottleneck with an activation behind it": mobile_vit,
    "EfficientViT": lambda: efficientvit_mit.MBConv(12, 20, act_layer=(HARDSWISH, HARDSWISH, None)),
    "EfficientViT with biases": lambda: efficientvit_mit.MBConv(
        12, 12, use_bias=(True, True, False), norm_layer=(None, None, nn.BatchNorm2d), act_layer=(GELU, GELU, None)
    ),
    "torchvision's MobileNetV2": lambda: mobilenetv2.InvertedResidual(12, 12, 1, 3),
    "torchvision's MobileNetV3": mobilenet_v3,
    "torchvision's MNASNet": lambda: mnasnet._InvertedResidual(12, 12, 3, 1, 3),
}
blocks = pytest.mark.parametrize("name", BLOCKS)
memories = pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)


def make(name, draw=0, **options):
    torch.manual_seed(draw)
    return grown(BLOCKS[name](**options), draw)


def images(*size, memory=torch.contiguous_format, draw=0):
    generator = torch.Generator().manual_seed(draw)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(memory_format=memory)


@memories
@blocks
def test_a_fused_block_computes_what_the_plain_one_does(name, memory):
    for size in ((2, 12, 5, 7), (1, 12, 9, 4)):
        for training in (False, True):
            block, x = make(name).train(training), images(*size, memory=memory)
            assert_equal_in_float64(block, (x,))
            assert fuse(block)(x).is_contiguous(memory_format=memory)


@blocks
def test_a_fused_block_is_as_accurate_as_the_plain_one(name):
    assert_accurate_in_float32(lambda draw: (make(name, draw), (images(2, 12, 6, 7, draw=draw),)))


@memories
@blocks
def test_a_frozen_block_is_prepacked(name, memory):
    block, x = make(name).eval(), images(2, 12, 5, 7, memory=memory)
    frozen = freeze(block)
    assert "_prepacked" in vars(frozen.model)
    torch.testing.assert_close(frozen(x), block(x), rtol=1e-10, atol=1e-10)


# Of 12 channels, with a stride of 2.
STRIDED = {
    "TinyViT": lambda: tiny_vit.PatchMerging(12, 20, nn.GELU),
    "MobileNetV3": lambda: InvertedResidual(12, 20, 5, stride=2, exp_ratio=3, act_layer=HARDSWISH),
    "torchvision's MobileNetV2": lambda: mobilenetv2.InvertedResidual(12, 20, 2, 3),
}


@memories
@pytest.mark.parametrize("name", STRIDED)
def test_a_stride_is_served_at_inference(name, memory):
    block = grown(STRIDED[name]()).eval()
    fused = fuse(copy.deepcopy(block))
    for size in ((2, 12, 5, 8), (1, 12, 4, 7), (1, 12, 1, 1)):
        x = images(*size, memory=memory)
        with torch.no_grad(), use_backend("leff=native"):
            found, expected = fused(x), block(x)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert found.is_contiguous(memory_format=memory)
    assert explain(fused)[0].backend == "native"
    assert_equal_in_float64(block.train(), (images(2, 12, 5, 8, memory=memory),), backend="auto")


def test_a_stride_is_served_in_no_other_call():
    block, x = grown(STRIDED["TinyViT"]()).eval(), images(1, 12, 5, 8)
    with use_backend("leff=native"):
        with pytest.raises(BackendError, match="with a stride only eager calls without gradients"):
            fuse(copy.deepcopy(block))(x)
        block.conv2.bn.train()
        with torch.no_grad(), pytest.raises(BackendError, match=r"stride=\(1, 1\) in conv2.conv, not \(2, 2\)"):
            fuse(block)(x)
    assert "stride=(1, 1)" in explain(block)[0].reason


@pytest.mark.parametrize("name", ["TinyViT", "MobileNetV2"])
def test_a_path_that_is_dropped_is_the_plain_ones(name):
    drop = {"drop_path": 0.5} if name == "TinyViT" else {"drop_path_rate": 0.5}
    plain = make(name, **drop)
    fused, x, results = fuse(copy.deepcopy(plain)), images(6, 12, 5, 5), []
    for block, backend in ((plain, "auto"), (fused, "native")):
        torch.manual_seed(0)
        with use_backend(f"leff={backend}"):
            results.append(block(x))
    shortcut = plain.act3(x) if name == "TinyViT" else x
    assert any(torch.equal(*pair) for pair in zip(results[0], shortcut, strict=True))
    torch.testing.assert_close(*results)


@blocks
def test_autocast_gives_the_plain_dtype(name):
    block, x = make(name).float().eval(), images(1, 12, 5, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = block(x), fuse(copy.deepcopy(block))(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def hook_on_a_norm(block):
    block.bn1.register_forward_hook(lambda module, inputs, out: out + 1)


def hook_on_an_activation(block):
    block.bn2.act.register_forward_hook(lambda module, inputs, out: out * 2)


def adapter(block):
    class Adapted(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    block.conv_pw.__class__ = Adapted


def pruning(block):
    prune.l1_unstructured(block.conv_pwl, "weight", 0.5)


def parametrization(block):
    parametrizations.weight_norm(block.conv_dw)


def gate(block):
    block.se = SqueezeExcite(40).double()


def another_norm(block):
    block.bn3 = nn.Sequential(nn.GroupNorm(2, 12), nn.ReLU()).double()


def dilation(block):
    block.conv_dw.dilation, block.conv_dw.padding = (2, 2), (2, 2)


@pytest.mark.parametrize(
    "change",
    [hook_on_a_norm, hook_on_an_activation, adapter, pruning, parametrization, gate, another_norm, dilation],
    ids=lambda change: change.__name__,
)
def test_what_is_done_to_a_block_is_not_ignored(change):
    plain = make("MobileNetV2").eval()
    fused, x = fuse(copy.deepcopy(plain)), images(1, 12, 5, 5)
    before = fused(x)
    torch.manual_seed(0)
    change(fused)
    torch.manual_seed(0)
    change(plain)
    assert fused.plain_reason()
    assert torch.equal(fused(x), plain(x))
    assert not torch.equal(fused(x), before)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda: InvertedResidual(12, 12, stride=2, exp_ratio=3), "with a stride only eager calls without gradients"),
        (lambda: InvertedResidual(12, 12, exp_ratio=3, se_layer=SqueezeExcite), "Identity for se, not SqueezeExcite"),
        (lambda: ConvMlpWithNorm(12, 40), "ConvNormAct for mid, not Identity"),
        (lambda: InvertedResidual(12, 12, exp_ratio=3, act_layer=nn.ELU), "for act, not ELU"),
        (lambda: InvertedResidual(12, 12, exp_ratio=3, group_size=4), "are not a pointwise, a depthwise"),
        (lambda: mobilenetv2.InvertedResidual(12, 12, 1, 1), "Conv2dNormActivation for 1, not Conv2d"),
    ],
)
def test_what_the_kernels_lack_says_why(block, reason):
    plain = block().eval()
    fused, x = fuse(copy.deepcopy(plain)), torch.ones(1, 12, 5, 5)
    assert torch.equal(fused(x), plain(x))
    with use_backend("leff=native"), pytest.raises(BackendError, match=reason):
        fused(x)


def tiny_vit_model():
    return timm.create_model(
        "tiny_vit_5m_224", embed_dims=(12, 16, 24, 32), depths=(2, 1, 1, 1), num_heads=(1, 1, 2, 2), num_classes=5
    )


@pytest.mark.parametrize(
    ("model", "sizes", "count"),
    [
        (lambda: timm.create_model("mobilenetv2_035", num_classes=5), [(65, 97), (96, 72)], 12),
        (tiny_vit_model, [(70, 98), (97, 64)], 2),
    ],
    ids=["MobileNetV2", "TinyViT"],
)
def test_a_fused_model_computes_what_the_plain_one_does(model, sizes, count):
    torch.manual_seed(0)
    model = grown(model())
    assert len(fused_names(model)) >= count
    for size in sizes:
        assert_equal_in_float64(model.eval(), (images(1, 3, *size),), backend="auto")
    assert_equal_in_float64(model.train(), (images(3, 3, *sizes[0]),), backend="auto")


def test_a_frozen_model_has_norms_only_where_they_are_prepacked_or_hooked():
    torch.manual_seed(0)
    model = grown(timm.create_model("mobilenetv2_035", num_classes=5)).eval()
    model.blocks[1][0].conv_dw.register_forward_hook(lambda module, inputs, out: out)
    x, frozen = images(2, 3, 65, 97), freeze(model)
    norms = {name for name, module in frozen.model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    blocks = [name for name, module in frozen.model.named_modules() if "_prepacked" in vars(module)]
    assert {name for name in norms if not name.startswith(tuple(blocks))} == {"blocks.1.0.bn2"}
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-10, atol=1e-10)
    assert all(isinstance(module, nn.BatchNorm2d) for name, module in model.named_modules() if name in norms)


@torch.no_grad()
@pytest.mark.parametrize("name", STRIDED)
def test_a_later_hook_of_a_frozen_part_sees_what_it_sees_in_the_model(name):
    block, x = grown(STRIDED[name]()).eval(), images(1, 12, 5, 8)
    frozen = freeze(block)
    for module in (block, frozen.model):
        convolution = next(m for m in module.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)
        convolution.register_forward_hook(lambda part, given, out: 2 * out)
    torch.testing.assert_close(frozen(x), block(x), rtol=1e-10, atol=1e-10)


def test_frozen_attention_with_a_bias_is_one_call():
    attention = grown(tiny_vit.Attention(32, 16, 2, attn_ratio=1, resolution=(7, 7)))
    attention.eval()
    frozen, x = freeze(attention), images(3, 49, 32)
    with torch.no_grad(), torch.profiler.profile() as profile:
        out = frozen(x)
    called = {event.key for event in profile.key_averages()}
    assert "ceit::_attention_infer" in called
    assert not any("softmax" in name or "scaled_dot_product" in name for name in called)
    torch.testing.assert_close(out, attention(x), rtol=1e-10, atol=1e-10)


def test_a_compiled_block_is_one_graph():
    block, x = make("TinyViT").eval(), images(1, 12, 5, 7)
    expected = block(x)
    compiled = torch.compile(fuse(block), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    assert compiled(x).stride() == expected.stride()


@pytest.mark.kernels
@memories
@pytest.mark.parametrize("name", ["TinyViT", "EfficientViT with biases"])
def test_the_triton_kernels_take_images(name, memory):
    block = make(name).float().to(DEVICE)
    x = images(1, 12, 3, 2, memory=memory).float().to(DEVICE)
    with torch.no_grad(), use_backend("leff=triton"):
        fused = fuse(copy.deepcopy(block).eval())(x)
    torch.testing.assert_close(fused, block.eval()(x))
    assert fused.is_contiguous(memory_format=memory)
