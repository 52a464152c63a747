"""Convolutions one after another in frozen models, as one compiled call."""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.accuracy import assert_as_accurate_over_draws
from support.adapters import grown
from timm.layers import Mlp, SEModule
from timm.models import efficientformer_v2, efficientvit_mit, tiny_vit
from timm.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    SqueezeExcite,
    UniversalInvertedResidual,
)
from torch import nn
from torchvision.models import efficientnet, mobilenetv2, mobilenetv3

from ceit_kernels import explain, freeze, use_backend
from ceit_kernels.convnet import FrozenConvnet

RESIDUAL = partial(InvertedResidual, act_layer=nn.ReLU6, exp_ratio=3)


def of_12_channels(config):
    config.input_channels = config.out_channels = 12  # which it has rounded
    return config


# Of 12 channels.
BLOCKS = {
    "convolution": lambda: nn.Conv2d(12, 20, 3, padding=1),
    "convolution without padding": lambda: nn.Conv2d(12, 20, 3, stride=2, bias=False),
    "patches": lambda: nn.Conv2d(12, 20, 4, stride=4),
    "pointwise of stride 2": lambda: nn.Conv2d(12, 20, 1, stride=2),
    "depthwise": lambda: nn.Conv2d(12, 12, 7, padding=3, groups=12),
    "sequence": lambda: nn.Sequential(nn.Conv2d(12, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 12, 1)),
    "MobileNetV2, stride 2": lambda: RESIDUAL(12, 20, stride=2),
    "MobileNetV2, shortcut": lambda: RESIDUAL(12, 12, 5),
    "torchvision's MobileNetV2": lambda: mobilenetv2.InvertedResidual(12, 20, 2, 3),
    "separable": lambda: DepthwiseSeparableConv(12, 12, 5, act_layer=nn.Hardswish),
    "dense expansion": lambda: EdgeResidual(12, 12, exp_ratio=2, act_layer=nn.SiLU),
    "dense shortcut": lambda: ConvBnAct(12, 12, 3, skip=True),
    "MobileNetV4": lambda: UniversalInvertedResidual(12, 12, 5, 3, 3, exp_ratio=2, noskip=True),
    "MobileNetV4, shortcut": lambda: UniversalInvertedResidual(12, 12, 3, 3, exp_ratio=2),
    "EfficientFormerV2": lambda: efficientformer_v2.EfficientFormerV2Block(12, use_attn=False),
    "EfficientFormerV2's stem": lambda: efficientformer_v2.Stem4(12, 16),
    "no depthwise convolution": lambda: efficientformer_v2.ConvMlpWithNorm(12, 20, 12),
    "TinyViT": lambda: tiny_vit.MBConv(12, 12, 2.0, nn.GELU, 0.0),
    "TinyViT's merging": lambda: tiny_vit.PatchMerging(12, 16, nn.GELU),
    "EfficientViT": lambda: efficientvit_mit.DSConv(12, 12, act_layer=(nn.ReLU, nn.Identity)),
    "MobileNetV3": lambda: InvertedResidual(
        12, 12, exp_ratio=3, se_layer=partial(SqueezeExcite, gate_layer=nn.Hardsigmoid)
    ),
    "EfficientNet, stride 2": lambda: InvertedResidual(
        12, 20, 5, 2, exp_ratio=3, act_layer=nn.SiLU, se_layer=SqueezeExcite
    ),
    "gated": lambda: RESIDUAL(12, 12, 5, se_layer=SEModule),
    "separable with a gate": lambda: DepthwiseSeparableConv(12, 12, act_layer=nn.SiLU, se_layer=SEModule),
    "dense expansion with a gate": lambda: EdgeResidual(12, 12, exp_ratio=2, se_layer=SqueezeExcite),
    "torchvision's MobileNetV3": lambda: mobilenetv3.InvertedResidual(
        of_12_channels(mobilenetv3.InvertedResidualConfig(12, 3, 40, 12, True, "HS", 1, 1, 1)), nn.BatchNorm2d
    ),
    "torchvision's EfficientNet": lambda: efficientnet.MBConv(
        of_12_channels(efficientnet.MBConvConfig(3, 3, 1, 12, 12, 1)), 0.1, nn.BatchNorm2d
    ),
    "shortcuts in a row": lambda: nn.Sequential(
        RESIDUAL(12, 12), RESIDUAL(12, 24, stride=2), RESIDUAL(24, 24), nn.Conv2d(24, 8, 1)
    ),
}
blocks = pytest.mark.parametrize("name", BLOCKS)


def make(name, draw=0):
    torch.manual_seed(draw)
    return grown(BLOCKS[name](), draw).eval()


def images(*size, draw=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)


def run(frozen, x):
    """The result of a module that is one compiled call."""
    assert isinstance(frozen.model, FrozenConvnet)
    assert frozen.model._prepacked.is_intact()
    with use_backend("leff=native"):
        return frozen(x)


@blocks
def test_computes_what_the_modules_do(name):
    block = make(name)
    frozen = freeze(block)
    # The last is so large that the hidden pixels go by a few rows at a time.
    for size in ((1, 12, 9, 4), (3, 12, 6, 13), (1, 12, 60, 61)):
        x = images(*size)
        for memory in (torch.contiguous_format, torch.channels_last):
            out = run(frozen, x.to(memory_format=memory))
            torch.testing.assert_close(out, block(x), rtol=1e-10, atol=1e-10)
            assert out.is_contiguous(memory_format=memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@blocks
def test_is_as_accurate_as_the_modules(name, dtype):
    def results(draw):
        block, x = make(name, draw).to(dtype), images(2, 12, 9, 7, draw=draw).to(dtype)
        exact = copy.deepcopy(block).double()
        with torch.no_grad():
            return [run(freeze(block), x)], [block(x)], [exact(x.double())]

    assert_as_accurate_over_draws([name], map(results, range(8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("side", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 3), (5, 3, 1), (7, 4, 3)])
@pytest.mark.parametrize(("channels", "outputs"), [(3, 32), (3, 16), (1, 5), (4, 41)])
def test_a_convolution_of_few_channels_is_as_accurate(channels, outputs, side, stride, padding, dtype):
    def results(draw):
        torch.manual_seed(draw)
        layers = nn.Conv2d(channels, outputs, side, stride, padding), nn.BatchNorm2d(outputs), nn.ReLU6()
        model = grown(nn.Sequential(*layers), draw).eval().to(dtype)
        x = images(2, channels, 17, 70, draw=draw).to(dtype)
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            return [run(freeze(model), x)], [model(x)], [exact(x.double())]

    if dtype == torch.float64:
        found, expected, _ = results(0)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    else:
        assert_as_accurate_over_draws(["image"], map(results, range(4)))


def test_a_shortcut_around_a_convolution_of_few_channels_is_added():
    block, x = grown(ConvBnAct(3, 3, 3, skip=True)).eval(), images(2, 3, 9, 30)
    torch.testing.assert_close(run(freeze(block), x), block(x), rtol=1e-10, atol=1e-10)


@st.composite
def sequences(draw):
    """Modules one after another, and their input channels."""
    channels = first = draw(st.integers(1, 20))
    modules = []
    for _ in range(draw(st.integers(1, 5))):
        side, stride = draw(st.sampled_from([1, 1, 2, 3, 5])), draw(st.sampled_from([1, 1, 2]))
        outputs, groups = draw(st.integers(1, 20)), 1
        if side in (3, 5) and draw(st.booleans()):
            outputs, groups = channels, channels
        bias, padding = draw(st.booleans()), draw(st.integers(0, 3))
        modules.append(nn.Conv2d(channels, outputs, side, stride, padding, groups=groups, bias=bias))
        modules += [nn.BatchNorm2d(outputs, affine=bias)] if draw(st.booleans()) else []
        modules += draw(st.sampled_from([[], [nn.ReLU()], [nn.GELU(), nn.Dropout(0.5)], [nn.Hardswish()]]))
        channels = outputs
    return nn.Sequential(*modules), first


@given(sequences(), st.integers(1, 3), st.integers(12, 40), st.integers(12, 40))
def test_any_convolutions_are_one_call(made, batch, height, width):
    model, channels = made
    model, x = grown(model).eval(), images(batch, channels, height, width)
    try:
        expected = model(x)
    except RuntimeError:  # nothing is left of the image
        return
    torch.testing.assert_close(run(freeze(model), x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["mobilenetv2_035", "mobilenetv3_small_050"])
def test_the_convolutions_of_a_whole_model_are_one_call(name):
    torch.manual_seed(0)
    model = grown(timm.create_model(name, num_classes=5)).eval()
    frozen, x = freeze(model), images(2, 3, 65, 97)
    with torch.no_grad():
        torch.testing.assert_close(run(frozen, x), model(x), rtol=1e-10, atol=1e-10)
    convolutions = {row.name: row.backend for row in explain(frozen) if row.operator == "leff"}
    assert convolutions.pop("model.conv_head", "native") == "native"  # MobileNetV3's, behind the pooling
    assert convolutions == {"model": "native"}


@pytest.mark.parametrize(
    "make_mlp",
    [
        lambda: nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Dropout(0.5), nn.Linear(40, 9, bias=False)),
        lambda: nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 30), nn.SiLU(), nn.Linear(30, 5)),
        lambda: Mlp(12, 48),
        lambda: tiny_vit.NormMlp(12, 1100, norm_layer=nn.LayerNorm),
    ],
)
def test_linear_layers_one_after_another_are_one_call(make_mlp):
    mlp = grown(make_mlp()).eval()
    frozen = freeze(mlp)
    for size in ((1, 12), (5, 12), (2, 150, 12), (2, 3, 4, 12), (2, 1, 3, 2, 12)):
        x = images(*size)
        torch.testing.assert_close(run(frozen, x), mlp(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(run(frozen, x.transpose(0, -2)), mlp(x.transpose(0, -2)), rtol=1e-10, atol=1e-10)
    assert [row.backend for row in explain(frozen) if row.operator == "leff"] == ["native"]


def with_a_hook(block):
    block.bn2.act.register_forward_hook(lambda module, inputs, out: 2 * out)


def with_another_child(block):
    block.bn2 = nn.Sequential(block.bn2, nn.Tanh())


def with_another_class(block):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    block.conv_dw.__class__ = Doubled


def with_another_forward(block):
    block.conv_dw.forward = torch.sin


def with_another_weight(block):
    block.conv_pwl.weight = nn.Parameter(2 * block.conv_pwl.weight.detach())


def with_another_setting(block):
    block.conv_dw.dilation, block.conv_dw.padding = (2, 2), (4, 4)


def with_a_hook_of_a_gate(block):
    block.se.gate.register_forward_hook(lambda module, inputs, out: out / 2)


def with_another_gate(block):
    block.se.gate = nn.Tanh()


def with_a_gate_of_the_largest_pixel(block):
    block.se.add_maxpool = True


@pytest.mark.parametrize(
    "change",
    [
        with_a_hook,
        with_another_child,
        with_another_class,
        with_another_forward,
        with_another_weight,
        with_another_setting,
        with_a_hook_of_a_gate,
        with_another_gate,
        with_a_gate_of_the_largest_pixel,
    ],
)
def test_what_is_done_to_the_parts_is_not_ignored(change):
    block, x = make("gated" if "_gate" in change.__name__ else "MobileNetV2, shortcut"), images(1, 12, 9, 7)
    changed = copy.deepcopy(block)
    change(changed)
    expected = changed(x)
    assert (expected - block(x)).abs().max() > 1e-3
    torch.testing.assert_close(freeze(changed)(x), expected, rtol=1e-10, atol=1e-10)
    frozen = freeze(block)
    change(frozen.model)
    assert explain(frozen)[0].backend == "plain"
    torch.testing.assert_close(frozen(x), expected, rtol=1e-10, atol=1e-10)


def gated(gate, behind):
    return nn.Sequential(nn.Conv2d(12, 8, 1), gate, behind)


class Subclass(mobilenetv2.InvertedResidual):
    """A subclass, of which nothing is known."""


def with_a_shortcut_of_another_shape():
    block = ConvBnAct(12, 1, 3)
    block.has_skip = True
    return block


@pytest.mark.parametrize(
    "make_block",
    [
        lambda: Subclass(12, 12, 1, 3),
        with_a_shortcut_of_another_shape,
        lambda: nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, padding_mode="circular"), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv2d(12, 12, 3, padding="same", groups=3), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv2d(12, 12, 3, dilation=2), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv2d(12, 12, 1), nn.ReLU(), nn.BatchNorm2d(12)),
        lambda: nn.Sequential(nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12, track_running_stats=False)),
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Conv2d(12, 12, 3)),
        lambda: nn.Sequential(nn.Conv2d(12, 8, 1), nn.Linear(8, 5)),
        lambda: nn.Sequential(nn.Linear(8, 5), nn.ReLU()),
        lambda: nn.Sequential(nn.BatchNorm2d(12), nn.Conv2d(12, 12, (1, 3))),
        lambda: gated(SEModule(8, gate_layer=nn.Tanh), nn.Conv2d(8, 12, 1)),
        lambda: gated(SEModule(8, add_maxpool=True), nn.Conv2d(8, 12, 1)),
        lambda: gated(SEModule(8), nn.Conv2d(8, 12, 3)),
        lambda: gated(SEModule(8), nn.BatchNorm2d(8)),
    ],
)
def test_other_modules_stay_as_they_are(make_block):
    block, x = grown(make_block()).eval(), images(2, 12, 9, 8)
    frozen = freeze(block)
    assert not isinstance(frozen.model, FrozenConvnet)
    torch.testing.assert_close(frozen(x), block(x), rtol=1e-10, atol=1e-10)


def test_an_image_smaller_than_a_kernel_is_refused_as_by_pytorch():
    for name, size in (("convolution without padding", (2, 9)), ("patches", (9, 3))):
        block = make(name)
        for module in (block, freeze(block)):
            with pytest.raises(RuntimeError, match=r"Kernel size|at least [34] pixels"):
                module(images(2, 12, *size))


def test_freezing_says_so_only_where_it_finds_nothing(caplog):
    freeze(make("sequence"))
    assert not caplog.text
    freeze(nn.Sequential(nn.ReLU()))
    assert "no module of Sequential was fused" in caplog.text


def test_calls_that_the_kernels_do_not_serve_are_the_modules():
    block, x = make("sequence").float(), images(1, 12, 9, 7).float()
    frozen = freeze(block)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(frozen(x), block(x), rtol=0.05, atol=0.05)
    torch.testing.assert_close(frozen.model[0](x[0]), block[0](x[0]))
    assert frozen(x[:0]).shape == block(x[:0]).shape
    with use_backend("leff=reference"):
        torch.testing.assert_close(frozen(x), block(x))
    with pytest.raises(RuntimeError, match="channels"):
        frozen(x[:, :5])


@pytest.mark.parametrize("name", ["shortcuts in a row", "MobileNetV2, shortcut"])
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda frozen: pickle.loads(pickle.dumps(frozen))])
def test_copies_compute_the_same(name, copied):
    frozen, x = freeze(make(name)), images(1, 12, 9, 7)
    expected = frozen(x)
    assert torch.equal(run(copied(frozen), x), expected)
    assert torch.equal(run(frozen, x), expected)


def test_compilers_see_the_modules():
    frozen, x = freeze(make("MobileNetV2, shortcut")), images(1, 12, 9, 7)
    with torch.no_grad():
        expected = frozen(x)
        compiled = torch.compile(frozen, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-10, atol=1e-10)
        exported = torch.export.export(frozen, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.func.vmap(frozen)(x[None])[0], expected, rtol=1e-10, atol=1e-10)
