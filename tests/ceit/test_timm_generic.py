"""The generic tests that timm runs on its own models, and that its ViT passes, on the models plain and fused."""

import copy
import math

import pytest
import timm
import torch
from timm.layers import get_channel_dim, get_spatial_dim, set_scriptable
from timm.models import FeatureInfo
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor, get_graph_node_names

from ceit_kernels import FusedImage2Tokens

NAME = "ceit_tiny_patch16_224"
SMALL = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 42}


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def small(request):
    """Make a model of some kind."""

    def make(**options):
        torch.manual_seed(0)
        return timm.create_model(NAME, fused=request.param, **{**SMALL, **options})

    return make


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def assert_every_parameter_has_a_gradient(model, outputs):
    outputs.mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert sum(p.grad.numel() for p in model.parameters()) == sum(p.numel() for p in model.parameters())


def test_forward_with_and_without_gradient_checkpointing(small, images):
    model = small().eval()
    outputs = model(images)
    assert outputs.shape == (2, 42)
    assert outputs.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images), outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward(small, images, checkpointing):
    model = small().train()
    model.set_grad_checkpointing(checkpointing)
    outputs = model(images)
    assert outputs.shape == (2, 42)
    assert outputs.isfinite().all()
    assert_every_parameter_has_a_gradient(model, outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_forward_and_backward_in_another_type(small, images, dtype):
    model = small().to(dtype=dtype)
    outputs = model(images.to(dtype))
    assert outputs.dtype == dtype
    assert_every_parameter_has_a_gradient(model, outputs)


def test_forward_and_backward_of_images_that_are_channels_last(small, images):
    model = small().eval()
    expected = model(images)
    model = model.to(memory_format=torch.channels_last)
    outputs = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    assert_every_parameter_has_a_gradient(model, outputs)


def test_default_cfgs(small, images):
    model = small().eval()
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (42, 32, 32)
    features = model.forward_features(images)
    assert features.shape == (2, 17, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(images).shape == (2, 17, model.num_features)

    bare = small(num_classes=0).eval()
    assert bare(images).shape == (2, bare.num_features)
    assert small(num_classes=0, global_pool="").eval()(images).shape == (2, 17, bare.num_features)
    state, cfg = small().state_dict(), model.default_cfg
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= set(state)
    assert f"{cfg['classifier']}.weight" not in bare.state_dict()


@pytest.mark.parametrize("size", [(64, 96), 32, (48, 64)])
def test_set_input_size(small, size):
    model = small().eval()
    model.set_input_size(size)
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, 3, height, width)
    assert model(images).shape == (2, 42)
    assert model.forward_features(images).shape == (2, 1 + height // 16 * (width // 16), 32)
    assert_every_parameter_has_a_gradient(model, model.train()(images))


def test_dynamic_image_size(small):
    model = small(dynamic_img_size=True).eval()
    for size in ((64, 64), (48, 80)):
        with torch.no_grad():
            assert model(torch.randn(2, 3, *size)).shape == (2, 42)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_channels(small, in_chans):
    assert small(in_chans=in_chans).eval()(torch.randn(2, in_chans, 64, 64)).shape == (2, 42)


def check_features(features, info, images, output_fmt="NCHW"):
    channel, (height, width) = get_channel_dim(output_fmt), get_spatial_dim(output_fmt)
    assert len(features) == len(info.channels()) >= 3
    for channels, reduction, feature in zip(info.channels(), info.reduction(), features, strict=True):
        assert feature.shape[channel] == channels
        assert feature.shape[height] <= math.ceil(images.shape[2] / reduction) + 1
        assert feature.shape[width] <= math.ceil(images.shape[3] / reduction) + 1
        assert feature.shape[0] == images.shape[0]
        assert feature.isfinite().all()


def test_forward_features(small, images):
    model = small(features_only=True).eval()
    check_features(model(images), model.feature_info, images, model.output_fmt)


def test_forward_intermediates(small, images):
    model = small().eval()
    output, intermediates = model.forward_intermediates(images)
    check_features(intermediates, FeatureInfo(model.feature_info, len(model.feature_info)), images)
    torch.testing.assert_close(output, model.forward_features(images))
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(images)[0], output, rtol=1e-4, atol=1e-5)


def test_forward_intermediates_of_a_pruned_model(small, images):
    model = small().eval()
    expected = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    found = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    for feature, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(feature, reference)
    assert model(images).shape == (2, 17, 32)


TRACING = {
    "leaf_modules": get_notrace_modules(),
    "autowrap_functions": get_notrace_functions(),
    "param_shapes_constant": True,
}


def fx_model(model, train=False):
    """The model rebuilt from its graph, as timm's tests have it."""
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=TRACING)
    train_outputs = train_nodes[-1:]
    if train:
        nodes = [node.name for node in reversed(NodePathTracer(**TRACING).trace(model).nodes)]
        output = next(iter(reversed(NodePathTracer(**TRACING).trace(model).nodes)))
        train_outputs = [train_nodes[-nodes.index(node.name)] for node in output._input_nodes]
    return create_feature_extractor(
        model, train_return_nodes=train_outputs, eval_return_nodes=eval_nodes[-1:], tracer_kwargs=TRACING
    )


@torch.no_grad()
def test_forward_fx(small, images):
    model = small().eval()
    outputs = model(images)
    traced = fx_model(model)
    (fx_outputs,) = traced(images).values()
    # The graph calls stem and blocks one by one, the fused model several at once, in which sums have another order.
    fused = isinstance(model.i2t.backbone, FusedImage2Tokens)
    torch.testing.assert_close(fx_outputs, outputs, **({} if fused else {"rtol": 0, "atol": 0}))
    blocks = [node for node in traced.graph.nodes if str(node.target).startswith("blocks.3")]
    assert len(blocks) == 1


def test_backward_fx(small, images):
    model = fx_model(small().train(), train=True)
    (outputs,) = model(images).values()
    assert outputs.shape == (2, 42)
    assert_every_parameter_has_a_gradient(model, outputs)


@torch.no_grad()
def test_features_fx(small, images):
    expected = small().eval().forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    model = small(features_only=True, feature_cls="fx", out_indices=(0, 1, 2, 3)).eval()
    assert model.feature_info.channels() == [32] * 4
    for tokens, reference in zip(model(images), expected, strict=True):
        torch.testing.assert_close(tokens[:, 1:], reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_symbolic_trace_of_every_part(small, images, training):
    """Without timm's tracer, which takes blocks as they are."""
    model = small().train(training)
    traced = torch.fx.symbolic_trace(model)
    assert [node for node in traced.graph.nodes if node.target == "blocks.3.leff.conv1"]
    expected = copy.deepcopy(model)(images)
    outputs = traced(images)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    assert_every_parameter_has_a_gradient(model, outputs)


@pytest.mark.parametrize(
    "options", [{}, {"dynamic_img_size": True}, {"global_pool": "avg"}, {"num_classes": 0}, {"drop_path_rate": 0.1}]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_forward_torchscript(small, images, options):
    with set_scriptable(True):
        model = small(**options).eval()
    scripted = torch.jit.script(model)
    outputs = scripted(images)
    torch.testing.assert_close(outputs, model(images), rtol=1e-4, atol=1e-5)
    assert type(model.blocks[0].add_norm) is type(small().blocks[0].add_norm)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_backward_torchscript(small, images):
    scripted = torch.jit.script(small().train())
    assert_every_parameter_has_a_gradient(scripted, scripted(images))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_forward_fx_torchscript(small, images):
    with set_scriptable(True):
        model = small().eval()
    expected = model(images)
    (outputs,) = torch.jit.script(fx_model(model))(images).values()
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@torch.no_grad()
def test_forward_torchscript_with_features_fx(small, images):
    with set_scriptable(True):
        model = small(features_only=True, feature_cls="fx", out_indices=(0, 1, 2)).eval()
    outputs = torch.jit.script(model)(images)
    assert [tuple(tokens.shape) for tokens in outputs] == [(2, 17, 32)] * 3
