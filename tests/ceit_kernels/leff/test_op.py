"""``ceit::leff_inference`` called directly: the messages of bad input."""

import pytest
import torch

from ceit_kernels import BackendError

HIDDEN, CHANNELS, LAYER = 8, 4, 6  # tensors of a layer


def call(x=None, changes=None, **options):
    parameters = []
    for weight_shape in ((HIDDEN, CHANNELS, 1, 1), (HIDDEN, 1, 3, 3), (CHANNELS, HIDDEN, 1, 1)):
        parameters += [torch.zeros(weight_shape), *(torch.ones(weight_shape[0]) for _ in range(5))]
    for index, tensor in (changes or {}).items():
        parameters[index] = tensor
    settings = {"residual": None, "eps": [1e-5] * 3, "height": 3, "width": 3, "num_prefix_tokens": 1}
    settings |= {"activation1": "gelu", "activation2": "gelu", "compute_dtype": None, "backend": "triton"} | options
    return torch.ops.ceit.leff_inference(
        torch.zeros(2, 10, CHANNELS) if x is None else x, parameters, *settings.values()
    )


BAD_CALLS = {
    "width of x": ({"x": torch.zeros(2, 10, 5)}, ValueError, r"x: expected shape \(B, N, 4\), got \(2, 10, 5\)"),
    "integers": ({"x": torch.zeros(2, 10, 4).long()}, TypeError, "x: expected a floating-point tensor"),
    "token count": ({"height": 4}, ValueError, r"grid_size 4 \* 3 = 12 patch tokens, got 10 tokens in all"),
    "activation": ({"activation2": "elu"}, ValueError, r"activation: expected one of .*'silu'.*got 'elu'"),
    "layers": ({"eps": [1e-5]}, ValueError, "expected 6 and an eps for each of 3 layers, got 18 and 1"),
    "residual": ({"residual": torch.zeros(2, 9, 4)}, ValueError, r"residual: expected shape \(2, 10, 4\), got"),
    "taps": ({"changes": {LAYER: torch.zeros(8, 1, 3, 5)}}, ValueError, r"parameters\[6\]: expected shape"),
    "even kernel": ({"changes": {LAYER: torch.zeros(8, 1, 4, 4)}}, ValueError, r"a kernel of side \(3, 5, 7\), got 4"),
    "norm": ({"changes": {3: torch.zeros(7)}}, ValueError, r"parameters\[3\]: expected shape \(8\), got \(7,\)"),
    "dtype": ({"changes": {1: torch.zeros(8).half()}}, TypeError, r"parameters\[1\]: expected torch.float32 like x"),
    "device": (
        {"changes": {13: torch.zeros(4, device="meta")}},
        ValueError,
        r"parameters\[13\]: expected on cpu like x, got meta",
    ),
    "prefix width": (
        {"changes": {12: torch.zeros(6, 8, 1, 1), **{i: torch.zeros(6) for i in range(13, 18)}}},
        ValueError,
        r"parameters\[12\]: expected 4 outputs, which prefix tokens keep, got 6",
    ),
    "backend": ({}, BackendError, "ceit::leff: backend 'triton' cannot run: the tensor is on the CPU"),
    "unknown backend": ({"backend": "native"}, BackendError, "leff has no native implementation"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_argument_is_named_with_what_was_given_and_expected(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)
