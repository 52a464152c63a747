"""Whole frozen models, with their pooling and classifiers, as one compiled call."""

import copy
import inspect
import pickle
from functools import partial

import pytest
import timm
import torch
from support.accuracy import assert_as_accurate_over_draws
from support.adapters import grown
from support.small_models import efficientformer, pvt_v2, tiny_vit
from timm.layers import SelectAdaptivePool2d
from timm.models import mobilenetv3
from timm.models.efficientformer_v2 import EfficientFormerV2
from torch import nn
from torchvision.models import efficientnet, mnasnet, mobilenet_v3_small, mobilenetv2

from ceit_kernels import explain, freeze, use_backend


def torchvisions_efficientnet():
    setting = [efficientnet.MBConvConfig(1, 3, 1, 32, 16, 1), efficientnet.MBConvConfig(6, 3, 2, 16, 24, 1)]
    return efficientnet.EfficientNet(setting, 0.2, num_classes=5, last_channel=40)


SMALL = {"num_classes": 5, "drop_rate": 0.2}
# With the images that they take.
MODELS = {
    "MobileNetV2": (partial(timm.create_model, "mobilenetv2_035", **SMALL), (65, 33)),
    "MobileNetV3": (partial(timm.create_model, "mobilenetv3_small_050", **SMALL), (65, 33)),
    "EfficientFormerV2": (lambda: efficientformer(64, 128), (64, 128)),
    "TinyViT": (tiny_vit, (96, 48)),
    "PVTv2": (pvt_v2, (49, 70)),
    "torchvision's MobileNetV2": (partial(mobilenetv2.MobileNetV2, 5, width_mult=0.25), (65, 33)),
    "torchvision's MobileNetV3": (partial(mobilenet_v3_small, num_classes=5), (33, 65)),
    "torchvision's EfficientNet": (torchvisions_efficientnet, (33, 65)),
    "torchvision's MNASNet": (partial(mnasnet.MNASNet, 0.25, 5), (65, 33)),
}
models = pytest.mark.parametrize("name", MODELS)
takes_none = "head_dist is None" in inspect.getsource(EfficientFormerV2.forward_head)
later_timm = pytest.mark.skipif(not takes_none, reason="this timm calls a classifier that is None")
OF_TIMM = ["MobileNetV2", "MobileNetV3", "EfficientFormerV2", "TinyViT", "PVTv2"]


def make(name, draw=0):
    torch.manual_seed(draw)
    model = grown(MODELS[name][0](), draw)
    model.train(False)
    return model


def images(name, count=1, draw=0):
    generator = torch.Generator().manual_seed(draw)
    return torch.randn(count, 3, *MODELS[name][1], generator=generator, dtype=torch.float64)


def run(frozen, x):
    """The result of a model that is one call, from its images to its classes."""
    made = frozen.model._prepacked
    assert made.is_intact()
    assert made.steps.is_flat
    with use_backend("leff=native,attention=native"):
        out = frozen(x)
    assert made.fitting == {tuple(x.shape[2:]): True}
    return out


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@models
@torch.no_grad()
def test_a_model_is_one_call_with_its_classifier(name):
    model = make(name)
    frozen = freeze(model)
    for count in (1, 3):
        x = images(name, count)
        for memory in (torch.contiguous_format, torch.channels_last):
            close(run(frozen, x.to(memory_format=memory)), model(x))
    assert [(row.name, row.backend) for row in explain(frozen)] == [("model", "native")]
    x = images(name)
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(run(other, x), frozen(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["MobileNetV3", "torchvision's MNASNet"])
def test_is_as_accurate_as_the_model(name, dtype):
    def results(draw):
        model, x = make(name, draw).to(dtype), images(name, draw=draw).to(dtype)
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            return [run(freeze(model), x)], [model(x)], [exact(x.double())]

    assert_as_accurate_over_draws([name], map(results, range(8)))


@pytest.mark.parametrize("name", OF_TIMM)
@torch.no_grad()
def test_features_are_a_call_of_their_own(name):
    model, x = make(name), images(name, 2)
    frozen = freeze(model)
    features = frozen.model.forward_features(x)
    assert frozen.model._features.fitting == {tuple(x.shape[2:]): True}
    assert not frozen.model._prepacked.fitting
    close(features, model.forward_features(x))
    close(frozen.model.forward_head(features), model.forward_head(features))
    assert frozen.model._features.tensor.data_ptr() == frozen.model._prepacked.tensor.data_ptr()


@pytest.mark.parametrize("name", ["MobileNetV2", "MobileNetV3", "TinyViT", "PVTv2"])
@torch.no_grad()
def test_a_model_without_classes_gives_what_it_has_pooled(name):
    model, x = make(name), images(name, 2)
    model.reset_classifier(0)
    close(run(freeze(model), x), model(x))


def classifier_of(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def with_a_hook(model):
    classifier_of(model).register_forward_hook(lambda module, inputs, out: 2 * out)


def with_another_weight(model):
    weight = classifier_of(model).weight
    classifier_of(model)._buffers.pop("weight", None)
    classifier_of(model).weight = nn.Parameter(2 * weight.detach())


def with_another_forward(model):
    classifier_of(model).forward = lambda x: x[:, :5].sin()


def with_another_head(model):
    model.forward_head = lambda x, pre_logits=False: x.amax((2, 3))


def with_other_features(model):
    forward_features = model.forward_features
    model.forward_features = lambda x: forward_features(x).sin()


def with_other_pooling(model):
    model.global_pool = SelectAdaptivePool2d(pool_type="max", flatten=True)


def with_another_pool(model):
    model.global_pool.pool.dim = (3,)
    model.classifier = nn.Flatten(1)


def with_pooled_maps(model):
    model.global_pool.pool.flatten = False
    model.classifier = nn.Identity()


def with_a_hook_of_the_pooling(model):
    model.global_pool.register_forward_hook(lambda module, inputs, out: 2 * out)


def without_pooling(model):
    model.global_pool, model.head = "", nn.Identity()
    if hasattr(model, "head_dist"):
        model.head_dist = nn.Identity()


def with_another_norm(model):
    model.norm = nn.Tanh()


def with_one_classifier(model):
    model.head_dist = None


def with_more_layers(model):
    model.classifier.append(nn.Softmax(1))


def with_pooling_to_four(model):
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(2), nn.Identity()


def with_another_forward_of_its_own(model):
    model._forward_impl = lambda x: model.features(x).mean((2, 3))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, with_a_hook) for name in OF_TIMM),
        *((name, with_another_weight) for name in MODELS),
        ("MobileNetV2", with_another_forward),
        ("MobileNetV2", with_another_head),
        ("MobileNetV2", with_other_features),
        ("MobileNetV2", with_other_pooling),
        ("MobileNetV2", with_another_pool),
        ("MobileNetV2", with_pooled_maps),
        ("MobileNetV2", with_a_hook_of_the_pooling),
        ("EfficientFormerV2", without_pooling),
        ("EfficientFormerV2", with_another_norm),
        pytest.param("EfficientFormerV2", with_one_classifier, marks=later_timm),
        ("EfficientFormerV2", with_another_head),
        ("PVTv2", without_pooling),
        ("torchvision's MobileNetV2", with_more_layers),
        ("torchvision's MobileNetV2", with_another_forward_of_its_own),
        ("torchvision's MobileNetV3", with_pooling_to_four),
    ],
)
@torch.no_grad()
def test_what_is_done_to_a_head_is_not_ignored(name, change):
    model, x = make(name), images(name, 2)
    changed = copy.deepcopy(model)
    change(changed)
    expected, before = changed(x), model(x)
    assert expected.shape != before.shape or (expected - before).abs().max() > 1e-4
    close(freeze(changed)(x), expected)
    frozen = freeze(model)
    change(frozen.model)
    close(frozen(x), expected)
    assert not frozen.model._prepacked.is_intact()


@torch.no_grad()
def test_another_method_of_the_class_is_not_ignored(monkeypatch):
    model, x = make("MobileNetV3"), images("MobileNetV3")
    frozen = freeze(model)
    monkeypatch.setattr(mobilenetv3.MobileNetV3, "forward_head", lambda self, x, pre_logits=False: x.amax((2, 3)))
    close(frozen(x), model(x))
    close(freeze(model)(x), model(x))


@torch.no_grad()
def test_another_function_that_pools_is_not_ignored(monkeypatch):
    name = "torchvision's MobileNetV3"
    model, x = make(name), images(name)
    frozen = freeze(model)
    monkeypatch.setattr(nn.functional, "adaptive_avg_pool2d", lambda x, size: x.amax((2, 3), keepdim=True))
    close(frozen(x), model(x))
