"""What was done to parts of other libraries' models is followed by fused ones and by snapshots."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from support.adapters import grown, step
from timm.models.efficientformer_v2 import EfficientFormerV2
from torch import nn

from ceit_kernels import freeze, fuse, use_backend


def mobilenet():
    return timm.create_model("mobilenetv2_035", num_classes=5), (64, 64)


def efficientformer():
    widths = {"embed_dims": (6, 8, 12, 20), "depths": (1, 1, 1, 1), "mlp_ratios": 2}
    return EfficientFormerV2(**widths, img_size=(64, 64), num_vit=0, num_classes=5), (64, 64)


class Larger(nn.Module):
    def forward(self, x):
        return 1.25 * x


def clamp_otherwise(model):
    for module in model.modules():
        if isinstance(module, nn.ReLU6):
            module.max_val = 0.5


def synchronise_norms_without_their_activations(model):
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def add_children_that_nobody_calls(model):
    for module in list(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.add_module("extra", Larger())


def give_numbers_for_both_directions(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding, module.stride, module.dilation = module.padding[0], module.stride[0], module.dilation[0]


CHANGES = (
    clamp_otherwise,
    synchronise_norms_without_their_activations,
    add_children_that_nobody_calls,
    give_numbers_for_both_directions,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("make", [mobilenet, efficientformer], ids=lambda make: make.__name__)
def test_a_change_of_parts_is_followed(make, change):
    torch.manual_seed(0)
    model, size = make()
    model, x = grown(model).eval(), torch.randn(2, 3, *size, dtype=torch.float64)
    after, frozen = fuse(copy.deepcopy(model)), freeze(model)
    change(model)
    change(after)
    for training in (False, True):
        expected = step("auto", copy.deepcopy(model).train(training), [x])
        for fused in (after, fuse(copy.deepcopy(model))):
            found = step("auto", copy.deepcopy(fused).train(training), [x])
            largest = max(value.abs().max() for name, value in expected.items() if name.endswith(".grad"))
            for name, value in expected.items():
                scale = largest if name.endswith(".grad") else value.abs().max()
                assert (found[name] - value).abs().max() <= 1e-9 * scale, name
    with torch.no_grad():
        torch.testing.assert_close(freeze(model)(x), model(x), rtol=1e-9, atol=1e-9)
        if change is not synchronise_norms_without_their_activations:  # makes parameters of a snapshot's buffers
            change(frozen.model)
            torch.testing.assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-9)


PLACES = [(F, "batch_norm"), (F, "conv2d"), (nn.Conv2d, "forward"), (timm.layers.BatchNormAct2d, "forward")]


@pytest.mark.parametrize(("kind", "name"), PLACES, ids=["batch_norm", "conv2d", "Conv2d", "BatchNormAct2d"])
@torch.no_grad()
def test_norms_that_were_folded_are_called_where_something_is_put_in_their_place(kind, name, monkeypatch):
    model, size = mobilenet()
    model, x = grown(model).eval(), torch.randn(2, 3, *size, dtype=torch.float64)
    with use_backend("reference"):  # no operator serves them
        frozen = copy.deepcopy(freeze(model))
        left = [sum(isinstance(module, nn.BatchNorm2d) for module in each.modules()) for each in (frozen, model)]
        assert left[0] < left[1]
        before, method = frozen(x), getattr(kind, name)
        torch.testing.assert_close(before, model(x), rtol=1e-9, atol=1e-9)
        monkeypatch.setattr(kind, name, lambda *arguments, **options: method(*arguments, **options) + 0.1)
        assert (model(x) - before).abs().max() > 1e-6 * before.abs().max()
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-9)
        monkeypatch.undo()
        assert torch.equal(frozen(x), before)
        with pytest.raises(RuntimeError, match="a frozen model cannot be trained"):
            frozen.model.train()


@torch.no_grad()
def test_torch_fx_traces_a_fused_model():
    model, size = mobilenet()
    model, x = grown(model).eval(), torch.randn(2, 3, *size, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(fuse(copy.deepcopy(model)))
    torch.testing.assert_close(traced(x), model(x), rtol=1e-9, atol=1e-9)


class AlwaysDropping(nn.Module):
    """Dropout at inference too (Gal and Ghahramani, ICML 2016): it ignores ``eval()`` in one of its parts."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.5), nn.Conv2d(8, 8, 3, padding=1))

    def train(self, mode=True):
        super().train(mode)
        self.layers[1].training = True
        return self

    def forward(self, x):
        return self.layers(x)


@torch.no_grad()
def test_a_dropout_that_stays_active_drops_in_a_snapshot():
    model, x = AlwaysDropping(), torch.randn(1, 3, 16, 16)
    outputs = []
    for module in (model.eval(), freeze(model)):
        torch.manual_seed(0)
        outputs.append(module(x))
    torch.testing.assert_close(*outputs)
