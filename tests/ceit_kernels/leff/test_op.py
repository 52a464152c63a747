"""LeFF's operators called directly: the messages of bad input."""

import pytest
import torch

from ceit_kernels import BackendError, FusedLeFF
from ceit_kernels.leff import choice
from ceit_kernels.leff.arguments import settings_of

HIDDEN, CHANNELS, LAYER = 8, 4, 6  # tensors of a layer


def make_parameters(changes=None):
    parameters = []
    for weight_shape in ((HIDDEN, CHANNELS, 1, 1), (HIDDEN, 1, 3, 3), (CHANNELS, HIDDEN, 1, 1)):
        parameters += [torch.zeros(weight_shape), *(torch.ones(weight_shape[0]) for _ in range(5))]
    for index, tensor in (changes or {}).items():
        parameters[index] = tensor
    return parameters


def call(x=None, changes=None, **options):
    settings = {"residual": None, "eps": [1e-5] * 3, "height": 3, "width": 3, "num_prefix_tokens": 1}
    settings |= {"activations": ["gelu", "gelu"], "compute_dtype": None, "backend": "triton"} | options
    x = torch.zeros(2, 10, CHANNELS) if x is None else x
    return torch.ops.ceit.leff_inference(x, *make_parameters(changes), *settings.values())


def call_forward(x=None, changes=None, **options):
    settings = {"residual": None, "eps": [1e-5] * 3, "norms": ["frozen"] * 3, "height": 3, "width": 3}
    settings |= {"num_prefix_tokens": 1, "activations": ["gelu", "gelu"], "group": None, "compute_dtype": None}
    settings |= {"backend": "triton"} | options
    x = torch.zeros(2, 10, CHANNELS) if x is None else x
    return torch.ops.ceit.leff(x, *make_parameters(changes), *settings.values())


BAD_CALLS = {
    "width of x": ({"x": torch.zeros(2, 10, 5)}, ValueError, r"x: expected shape \(B, N, 4\), got \(2, 10, 5\)"),
    "integers": ({"x": torch.zeros(2, 10, 4).long()}, TypeError, "x: expected a floating-point tensor"),
    "token count": ({"height": 4}, ValueError, r"grid_size 4 \* 3 = 12 patch tokens, got 10 tokens in all"),
    "activation": ({"activations": ["gelu", "elu"]}, ValueError, r"activations: expected of .*'silu'.*got 'elu'"),
    "layers": ({"eps": [1e-5]}, ValueError, "eps: expected one for each of 3 layers, got 1"),
    "residual": ({"residual": torch.zeros(2, 9, 4)}, ValueError, r"residual: expected shape \(2, 10, 4\), got"),
    "taps": (
        {"changes": {LAYER: torch.zeros(8, 1, 3, 5)}},
        ValueError,
        "weight2: expected a square kernel of an odd side, got 3.*5",
    ),
    "even kernel": (
        {"changes": {LAYER: torch.zeros(8, 1, 4, 4)}},
        ValueError,
        "weight2: expected a square kernel of an odd side, got 4",
    ),
    "norm": ({"changes": {3: torch.zeros(7)}}, ValueError, r"norm_bias1: expected shape \(8\), got \(7,\)"),
    "dtype": ({"changes": {1: torch.zeros(8).half()}}, TypeError, r"bias1: expected torch.float32 like x"),
    "device": (
        {"changes": {13: torch.zeros(4, device="meta")}},
        ValueError,
        r"bias3: expected on cpu like x, got meta",
    ),
    "prefix width": (
        {"changes": {12: torch.zeros(6, 8, 1, 1), **{i: torch.zeros(6) for i in range(13, 18)}}},
        ValueError,
        r"weight3: expected 4 outputs, which prefix tokens keep, got 6",
    ),
    "backend": ({}, BackendError, "ceit::leff: backend 'triton' cannot run: the tensor is on the CPU"),
    "unknown backend": ({"backend": "cuda"}, BackendError, "leff has no cuda implementation"),
}


BAD_FORWARD_CALLS = {
    "norms": ({"norms": ["batch"]}, ValueError, "norms: expected one for each of 3 layers, got 1"),
    "norm": ({"norms": ["batch", "layer", "none"]}, ValueError, "norms: expected of .*'frozen'.*got 'layer'"),
    "no norm": ({"norms": ["none"] * 3}, ValueError, "norm_weight1: expected None where the layer has no norm, got"),
    "statistics": ({"changes": {4: None, 5: None}}, ValueError, "running_mean1: expected a tensor where the norm is"),
    "one statistic": ({"changes": {17: None}}, ValueError, "running_var3: expected both running statistics or none"),
    "one value": (
        {"norms": ["batch"] * 3, "x": torch.zeros(1, 2, 4), "height": 1, "width": 1},
        ValueError,
        r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 8, 1, 1\]\)",
    ),
    "empty share": (
        {"norms": ["batch"] * 3, "x": torch.zeros(0, 10, 4), "group": "0"},
        ValueError,
        "x: expected an image in every process that shares its statistics, got an empty batch",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_FORWARD_CALLS.values(), ids=BAD_FORWARD_CALLS)
def test_a_bad_argument_of_training_is_named_too(changes, error, message):
    with pytest.raises(error, match=message):
        call_forward(**changes)


def test_a_bad_argument_of_backward_is_named_too():
    saved = [torch.zeros(18, HIDDEN)] * 3 + [torch.zeros(5, HIDDEN)] * 3 + [torch.zeros(1)]
    settings = ([1e-5] * 3, ["batch"] * 3, 3, 3, 1, ["gelu", "gelu"], None, None, "triton")

    def call_backward(grad_out, needs, changes=None):
        x = torch.zeros(2, 10, CHANNELS)
        torch.ops.ceit.leff_backward(grad_out, x, *make_parameters(changes), *saved, *settings, True, needs)

    grad_out = torch.zeros(2, 10, CHANNELS)
    with pytest.raises(ValueError, match=r"grad_out: expected shape \(2, 10, 4\), got \(2, 9, 4\)"):
        call_backward(grad_out[:, 1:], [True] * 12)
    with pytest.raises(ValueError, match="needs: expected 12, got 3"):
        call_backward(grad_out, [True] * 3)
    with pytest.raises(ValueError, match="needs: expected False for bias2, which is None, got True"):
        call_backward(grad_out, [True] * 12, {7: None})


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_training_refuses_what_inference_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        call_forward(**changes)


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_argument_is_named_with_what_was_given_and_expected(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_batches_of_about_one_size_are_one_kind_of_call(monkeypatch):
    monkeypatch.setattr(choice, "compute_capability", lambda device_index: 90)
    monkeypatch.setattr(choice, "fastest", lambda call, *others: call)
    parameters, eps, activations = FusedLeFF(4, 6).eval().inference_parts()
    settings = settings_of(eps, ["frozen"] * 3, 2, 2, 1, activations, None, None)
    kinds = [choice.choose(torch.randn(n, 5, 4), parameters, (None,) * 3, None, settings, False) for n in range(1, 10)]
    assert [kind.partition(",")[0] for kind in kinds] == [
        f"leff inference|tokens={tokens}" for tokens in (4, 8, 16, 16, 32, 32, 32, 32, 64)
    ]
