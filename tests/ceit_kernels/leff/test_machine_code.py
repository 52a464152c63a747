"""What the compilers make of the inference kernels for every chip, and how much a call launches and moves."""

from math import prod

import pytest
import torch
from support.leff import MODELS, SHAPES, make_shape
from support.machine_code import (
    AMD_CHIPS,
    DISTINCT_CHIPS,
    SHARED_MEMORY,
    assert_alike,
    assert_assembled,
    assert_efficient,
    assert_unspilled,
    compile_for_amd,
    compile_for_nvidia,
)
from torch._subclasses import FakeTensorMode

from ceit_kernels.common.launch import record_launches
from ceit_kernels.leff import choice
from ceit_kernels.leff.triton.launch_inference import leff_inference_triton
from ceit_kernels.leff.triton.launch_library import leff_inference_library


def record(shape, dtype, chip, *, residual=False, run=leff_inference_triton, **options):
    with FakeTensorMode(), record_launches(chip) as launches:
        x, parameters, settings = make_shape(shape, dtype, "frozen", **options)
        run(x, parameters, x if residual else None, settings, dtype)
    return launches


def test_small_in_bfloat16_runs_on_tensor_cores_without_spills():
    for launch in record("small", torch.bfloat16, 90):
        assert_efficient(launch, 90)
        assert_assembled(launch, 90)


@pytest.mark.prove
@pytest.mark.parametrize("shape", MODELS)
def test_cc_86_runs_what_cc_89_does(shape):
    assert_alike(*(record(shape, torch.bfloat16, chip, residual=True) for chip in (86, 89)), 86, 89)


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
def test_the_assembler_keeps_tensor_cores_and_wide_loads(chip):
    for launch in record("small", torch.bfloat16, chip, residual=True):
        assert_assembled(launch, chip)


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
@pytest.mark.parametrize(
    ("dtype", "residual", "shape"),
    [(torch.bfloat16, residual, shape) for residual in (False, True) for shape in SHAPES]
    + [(torch.float16, True, shape) for shape in MODELS],
    ids=str,
)
def test_every_model_runs_on_tensor_cores_without_spills(shape, dtype, residual, chip):
    for launch in record(shape, dtype, chip, residual=residual):
        assert_efficient(launch, chip)


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
def test_norms_in_float32_run_on_tensor_cores_without_spills(chip):
    for launch in record("small", torch.bfloat16, chip, norm_dtype=torch.float32):
        assert_efficient(launch, chip)


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS[1:])  # 80 takes what 89 does, and has more
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", ["tiny", "base", "Mix-FFN 56x56x64", "Mix-FFN 14x14x320"])
def test_the_wide_types_fit_the_shared_memory_of_every_chip(shape, dtype, chip):
    for launch in record(shape, dtype, chip):
        assert compile_for_nvidia(launch, chip).shared_bytes <= SHARED_MEMORY[chip]


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
@pytest.mark.parametrize("kernel_size", [5, 7])
def test_larger_kernels_fit_every_chip(kernel_size, chip):
    for launch in record("tiny", torch.bfloat16, chip, kernel_size=kernel_size):
        code = compile_for_nvidia(launch, chip)
        assert code.tensor_core_instructions
        assert code.shared_bytes <= SHARED_MEMORY[chip]


@pytest.mark.prove
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
def test_what_stands_between_a_librarys_gemms_does_not_spill(chip, kernel_size):
    for launch in record("small", torch.bfloat16, chip, run=leff_inference_library, kernel_size=kernel_size):
        assert_unspilled(launch, chip)


@pytest.mark.parametrize("chip", AMD_CHIPS)
def test_compiles_for_amd_with_matrix_instructions(chip):
    for launch in record("small", torch.bfloat16, 90):
        assert "v_mfma" in compile_for_amd(launch, chip)


@pytest.mark.parametrize("shape", MODELS)
def test_a_call_makes_two_launches_and_moves_ten_passes_over_the_tokens(shape):
    """The budget is 10.5 passes in 2 launches; `torch.compile` takes 37 in 6. Weights are no part of a pass."""
    launches = record(shape, torch.bfloat16, 90)
    channels, side, prefix = SHAPES[shape]
    assert [launch.kernel.__name__ for launch in launches] == ["leff_expand_kernel", "leff_contract_kernel"]
    tokens = 256 * (prefix + side * side)
    moved = 0
    for launch in launches:
        # The second launch reads of x only the prefix.
        names = ("p_x", "p_h") if launch is launches[0] else ("p_h", "p_out")
        moved += sum(prod(launch.arguments[name].shape) * launch.arguments[name].itemsize for name in names)
    assert moved / (2 * tokens * channels) <= 10.0
    weights = sum(
        prod(value.shape) * value.itemsize
        for launch in launches
        for name, value in launch.arguments.items()
        if isinstance(value, torch.Tensor) and name not in ("p_x", "p_h", "p_out")
    )
    assert (moved + weights) / (2 * tokens * channels) <= 10.5


@pytest.mark.parametrize("chip", [75, *SHARED_MEMORY])
def test_unmeasured_calls_are_fused_on_chips_whose_machine_code_is_known_up_to_a_width(chip, monkeypatch):
    monkeypatch.setattr(choice, "compute_capability", lambda device_index: chip)
    found = [choice._rule(channels, None) for channels in (255, 256)]
    assert found == ["triton" if chip in SHARED_MEMORY else "library", "library"]
