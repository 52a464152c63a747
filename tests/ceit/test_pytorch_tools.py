"""PyTorch's own tools on a model, plain and fused: quantisation, counting, meta tensors, copies, transforms."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from ceit import CeiT
from ceit_kernels import freeze, fuse, unfuse

SMALL = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}


def make_model(fused, **options):
    torch.manual_seed(0)
    model = CeiT(**{**SMALL, **options})
    return fuse(model) if fused else model


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def fused(request):
    return request.param


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def quantised(model):
    """The model with its linear layers quantised, and their names."""
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    kind = torch.ao.nn.quantized.dynamic.Linear
    return model, [name for name, module in model.named_modules() if isinstance(module, kind)]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize(
    "prepare", [lambda model: fuse(model, linear=False), lambda model: unfuse(fuse(model))], ids=["fused", "unfused"]
)
@torch.no_grad()
def test_linear_layers_are_quantised_where_they_are_not_fused(images, prepare):
    model = make_model(fused=False).eval()
    exact = model(images)
    plain, names = quantised(model)
    assert len(names) == 2 * 3 + 4 + 1
    expected = plain(images)
    assert 0 < (expected - exact).abs().max() < 0.05 * exact.abs().max()
    prepared, prepared_names = quantised(prepare(model))
    assert prepared_names == names
    # Rounding to 8 bits makes a step of what is a difference in the last bit.
    torch.testing.assert_close(prepared(images), expected, rtol=0, atol=0.02 * exact.abs().max().item())


def test_flops_are_those_of_the_plain_model(images):
    def count(model):
        with FlopCounterMode(display=False) as training:
            model(images).sum().backward()
        with FlopCounterMode(display=False) as inference, torch.no_grad():
            model.eval()(images)
        return training.get_total_flops(), inference.get_total_flops()

    training, inference = count(make_model(fused=False))
    # Of three products a step the stem's first has no gradient of its input.
    assert 2.5 * inference < training < 3 * inference
    assert count(make_model(fused=True)) == (training, inference)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_on_the_meta_device_gives_shapes(fused, training, gradients):
    with torch.device("meta"):
        model = make_model(fused).train(training)
    images = torch.empty(2, 3, 64, 64, device="meta")
    with torch.set_grad_enabled(gradients):
        logits, features, maps = model(images), model.forward_features(images), model.forward_intermediates(images)[1]
    assert (logits.shape, features.shape, maps[0].shape) == ((2, 7), (2, 17, 32), (2, 32, 4, 4))
    assert logits.is_meta
    if gradients:
        logits.sum().backward()
        assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_a_default_device_is_for_tensors_of_the_users(images, training):
    model = make_model(fused=False).train(training)
    fused = fuse(copy.deepcopy(model))
    with torch.set_grad_enabled(training):
        expected = model(images)
        with torch.device("meta"):
            found = [fused(images)] if training else [fused(images), freeze(model)(images)]
            if training:
                found[0].sum().backward()
    for out in found:
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_give_the_same_and_share_nothing(fused, images, duplicate):
    model = make_model(fused)
    model(images).sum().backward()
    model.eval()
    with torch.no_grad():
        expected = model(images)
        other = duplicate(model)
        assert torch.equal(other(images), expected)
        for parameter in other.parameters():
            parameter.mul_(1.1)
        assert torch.equal(model(images), expected)
        assert not torch.allclose(other(images), expected)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]


def test_parametrisations_of_any_layer_train(images, fused):
    def step(fused):
        model = make_model(fused)
        utils = nn.utils.parametrizations
        utils.weight_norm(model.blocks[1].attn.qkv)
        utils.spectral_norm(model.blocks[2].leff.conv1)
        utils.weight_norm(model.lca.attn.qkv)
        utils.orthogonal(model.head)
        prune.l1_unstructured(model.i2t.backbone.conv, "weight", amount=0.5)
        logits = model(images)
        logits.square().sum().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            vector = nn.utils.parameters_to_vector(model.parameters())
            nn.utils.vector_to_parameters(vector * 0.9, model.parameters())
            return logits, norm, model.eval()(images)

    torch.testing.assert_close(step(fused), step(False), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_each_image_are_those_of_one_after_the_other(images, fused, training):
    # Statistics of a batch would join the images.
    model = make_model(fused).double().train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images, parameters = images.double(), {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).square().sum()

    together = vmap(grad(loss), (None, 0))(parameters, images)
    for index, image in enumerate(images):
        model.zero_grad()
        loss(dict(model.named_parameters()), image).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together[name][index], parameter.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_forward_mode_gives_the_derivative_that_backward_gives(images, fused, training):
    model = make_model(fused).double().train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images = images.double().requires_grad_()
    direction = torch.randn_like(images)
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's flash attention for the CPU has no forward mode
        _, tangent = jvp(model, (images,), (direction,))
    weights = torch.randn_like(tangent)
    (gradient,) = torch.autograd.grad((model(images) * weights).sum(), images)
    torch.testing.assert_close((tangent * weights).sum(), (gradient * direction).sum(), rtol=1e-9, atol=1e-9)
