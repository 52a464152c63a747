"""The model agrees with the model file published with the paper, by figures that were computed from that file.

The golden files hold projections: a tensor's norm, and its product with a unit vector that is a formula of its name.
Parameters and images are formulas too, so neither the original file nor its weights are needed.
"""

import json
import math
import zlib
from pathlib import Path

import pytest
import torch

import ceit

GOLDEN = Path(__file__).parent / "golden"
MODELS = {
    "tiny": {"img_size": 224, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {
        "img_size": 64,
        "num_classes": 10,
        "embed_dim": 48,
        "depth": 5,
        "num_heads": 4,
        "mlp_ratio": 3,
        "leff_local_size": 5,
    },
}
BATCH_SIZE = 2
LOGITS_SHOWN = 8


def formula(name, shape):
    """Numbers in [-1, 1), float64, the same on every machine: a hash of the name and the index in integers."""
    index = torch.arange(math.prod(shape))
    mixed = (index * 0x9E3779B1 + zlib.crc32(name.encode())) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return (mixed.double() / 2**31 - 1).reshape(shape)


def fill(model):
    """Give every parameter and buffer a value of its own, of a size that keeps the activations near 1."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            values = formula(name, tensor.shape)
            if name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1):
                values = 1 + 0.3 * values
            elif name.endswith("weight"):
                values = values * (3 / tensor[0].numel()) ** 0.5
            else:
                values = 0.2 * values
            if tensor.is_floating_point():
                tensor.copy_(values)
    return model


def projection(name, tensor):
    values = tensor.detach().double()
    direction = formula(f"direction of {name}", tensor.shape)
    return [values.norm().item(), (values * direction).sum().item() / direction.norm().item()]


def measure(model, training):
    """Projections of the logits, of every gradient and of every buffer after one forward and backward pass."""
    parameter = next(model.parameters())
    size = MODELS["tiny" if model.num_classes == 1000 else "small"]["img_size"]
    images = formula("images", (BATCH_SIZE, 3, size, size)).to(parameter.dtype)
    model.train(training)
    logits = model(images)
    (logits * formula("weights of the loss", logits.shape).to(parameter.dtype)).sum().backward()
    return {
        "logits": logits.detach()[:, :LOGITS_SHOWN].double().tolist(),
        "outputs": {"logits": projection("logits", logits)},
        "gradients": {name: projection(name, p.grad) for name, p in model.named_parameters()},
        "buffers": {name: projection(name, b) for name, b in model.named_buffers()},
    }


def largest_error(measured, golden):
    """Largest difference of two sets of projections, relative to the tensor's norm.

    Norms below a thousandth of the largest count as that: a bias ahead of BatchNorm has a gradient of rounding errors.
    """
    assert list(measured) == list(golden)
    floor = 1e-3 * max(norm for norm, _ in golden.values())
    return max(
        abs(figure - expected) / max(golden[name][0], floor)
        for name in golden
        for figure, expected in zip(measured[name], golden[name], strict=True)
    )


@pytest.fixture(scope="module", params=MODELS)
def golden(request):
    return request.param, json.loads((GOLDEN / f"{request.param}.json").read_text())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)], ids=["f64", "f32"])
def test_outputs_gradients_and_buffers_are_the_originals(golden, training, dtype, tolerance):
    name, figures = golden
    expected = figures["train" if training else "eval"]
    measured = measure(fill(ceit.CeiT(**MODELS[name])).to(dtype), training)
    torch.testing.assert_close(
        torch.tensor(measured["logits"], dtype=torch.float64),
        torch.tensor(expected["logits"], dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance * expected["outputs"]["logits"][0],
    )
    for kind in ("outputs", "gradients", "buffers"):
        assert largest_error(measured[kind], expected[kind]) < tolerance, kind


def test_state_dict_has_the_originals_names_shapes_and_order(golden):
    name, figures = golden
    model = ceit.CeiT(**MODELS[name])
    assert [[key, list(tensor.shape)] for key, tensor in model.state_dict().items()] == figures["state_dict"]
    # Optimizer states number the parameters in this order.
    assert [key for key, _ in model.named_parameters()] == list(figures["initialisation"])


def test_the_same_seed_gives_the_originals_initialisation(golden):
    name, figures = golden
    torch.manual_seed(0)
    model = ceit.CeiT(**MODELS[name])
    measured = {key: projection(key, parameter) for key, parameter in model.named_parameters()}
    assert largest_error(measured, figures["initialisation"]) < 1e-6


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ceit_tiny_patch16_224", 6_356_904),
        ("ceit_small_patch16_224", 24_204_840),
        ("ceit_base_patch16_224", 94_405_416),
        ("ceit_tiny_patch16_384", 6_429_864),
        ("ceit_small_patch16_384", 24_350_760),
    ],
)
def test_models_have_the_originals_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = ceit.create_model(name, fused=False)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == 375
