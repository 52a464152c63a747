"""What the compilers make of the training kernels for every chip."""

import pytest
import torch
from support.machine_code import (
    CHIPS,
    SHARED_MEMORY,
    assert_efficient,
    assert_unspilled,
    compile_for_amd,
    compile_for_nvidia,
)
from torch._subclasses import FakeTensorMode

from ceit_kernels.common.launch import record_launches
from ceit_kernels.leff.backward import Needs, leff_backward_triton
from ceit_kernels.leff.forward import leff_forward_triton
from ceit_kernels.leff.problem import Problem

# channels, side of the image, prefix tokens, norms; hidden channels are four times the channels
SHAPES = {
    "tiny": (192, 14, 1, "batch"),
    "small": (384, 14, 1, "batch"),
    "base": (768, 14, 1, "batch"),
    "tiny at 384": (192, 24, 1, "batch"),
    "small at 384": (384, 24, 1, "batch"),
    "Mix-FFN 56x56x64": (64, 56, 0, "none"),
    "Mix-FFN 14x14x320": (320, 14, 0, "none"),
}
# Products of so few operations that what they run on does not matter.
SMALL_PRODUCTS = ("leff_fold_gradient_kernel", "leff_factored_weight_kernel")


def record(shape, dtype, chip, *, batch=256, kernel_size=3):
    """The launches of one training step."""
    channels, side, prefix, norm = SHAPES[shape]
    hidden, has_norm = 4 * channels, norm != "none"
    with FakeTensorMode(), record_launches(chip) as launches:

        def make(*size):
            return torch.empty(*size, device="cuda", dtype=dtype)

        parameters = []
        for size in ((hidden, channels, 1, 1), (hidden, 1, kernel_size, kernel_size), (channels, hidden, 1, 1)):
            parameters += [make(*size), make(size[0]), *(make(size[0]) if has_norm else None for _ in range(4))]
        x = make(batch, prefix + side * side, channels)
        activations = ("gelu", "gelu") if has_norm else ("identity", "gelu")
        problem = Problem(x, parameters, (norm,) * 3, (1e-5,) * 3, (side, side), prefix, activations, dtype)
        saved = leff_forward_triton(problem, None, dtype)
        needs = [Needs(weight=True, bias=True, norm_weight=has_norm, norm_bias=has_norm)] * 3
        leff_backward_triton(problem, saved, torch.empty_like(x), True, needs)
    return launches


def check(launch, chip):
    code = compile_for_nvidia(launch, chip)
    if code.products and launch.kernel.__name__ not in SMALL_PRODUCTS:
        assert_efficient(launch, chip)
    else:
        assert_unspilled(launch, chip)


def test_small_in_bfloat16_runs_on_tensor_cores_without_spills():
    for launch in record("small", torch.bfloat16, 90):
        check(launch, 90)


@pytest.mark.prove
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_model_runs_on_tensor_cores_without_spills(shape, chip):
    for launch in record(shape, torch.bfloat16, chip):
        check(launch, chip)


@pytest.mark.prove
@pytest.mark.parametrize("chip", [80, 90, 100, 120])
def test_float16_is_as_bfloat16(chip):
    for launch in record("small", torch.float16, chip):
        check(launch, chip)


@pytest.mark.prove
@pytest.mark.parametrize("chip", [80, 90, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", ["base", "Mix-FFN 56x56x64"])
def test_the_wide_types_fit_the_shared_memory_of_every_chip(shape, dtype, chip):
    for launch in record(shape, dtype, chip):
        assert compile_for_nvidia(launch, chip).shared_bytes <= SHARED_MEMORY[chip]


@pytest.mark.prove
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kernel_size", [5, 7])
def test_larger_kernels_do_not_spill(kernel_size, chip):
    for launch in record("tiny", torch.bfloat16, chip, kernel_size=kernel_size):
        if "depthwise" in launch.kernel.__name__:
            assert_unspilled(launch, chip)


@pytest.mark.prove
def test_compiles_for_amd_with_matrix_instructions():
    for launch in record("tiny", torch.bfloat16, 90):
        code = compile_for_amd(launch)
        if "OPERAND" in launch.arguments or "expand" in launch.kernel.__name__:
            assert "v_mfma" in code
