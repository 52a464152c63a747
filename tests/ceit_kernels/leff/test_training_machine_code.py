"""What the compilers make of the training kernels for every chip."""

import pytest
import torch
from support.leff import MODELS, SHAPES, make_shape
from support.machine_code import (
    CHIPS,
    DISTINCT_CHIPS,
    SHARED_MEMORY,
    assert_alike,
    assert_assembled,
    assert_efficient,
    assert_reads_behind_tickets,
    assert_unspilled,
    compile_for_amd,
    compile_for_nvidia,
)
from torch._subclasses import FakeTensorMode

from ceit_kernels.backends import PROVEN_AMD_CHIPS
from ceit_kernels.common.launch import record_launches
from ceit_kernels.leff.norms import BatchNorm
from ceit_kernels.leff.triton.launch_backward import leff_backward_triton
from ceit_kernels.leff.triton.launch_forward import leff_forward_triton
from ceit_kernels.leff.triton.launch_running import update_running_statistics_triton


def record(shape, dtype, chip, *, backend="triton", **options):
    """The launches of one training step."""
    with FakeTensorMode(), record_launches(chip) as launches:
        x, parameters, settings = make_shape(shape, dtype, "batch", **options)
        settings = settings._replace(backend=backend)
        out, *saved = leff_forward_triton(x, parameters, None, settings, dtype, norms_of(parameters))
        needs = [parameter is not None for i, parameter in enumerate(parameters) if i % 6 < 4]
        leff_backward_triton(torch.empty_like(out), x, parameters, saved, settings, True, needs)
    return launches


def norms_of(parameters):
    """The norms of layers whose tensors are in the order of the registered operators."""
    norms = []
    for i in range(0, len(parameters), 6):
        weight, bias, mean, variance = parameters[i + 2 : i + 6]
        count = None if mean is None else mean.new_empty((), dtype=torch.int64)
        norm = BatchNorm(mean, variance, weight, bias, training=True, num_batches_tracked=count)
        norms.append(None if mean is None else norm)
    return norms


def check(launch, chip):
    if compile_for_nvidia(launch, chip).products:
        assert_efficient(launch, chip)
    else:
        assert_unspilled(launch, chip)


def test_what_older_compilers_stop_at_compiles_on_cc_100():
    """Products of several tiles in a loop, which Triton 3.6 cannot pipeline there."""
    for launch in record("small", torch.bfloat16, 100, backend="library"):
        if launch.kernel.__name__ in ("leff_contract_operand_kernel", "leff_factored_gradient_kernel"):
            assert_unspilled(launch, 100)


@pytest.mark.prove
@pytest.mark.parametrize("shape", MODELS)
def test_cc_86_runs_what_cc_89_does(shape):
    assert_alike(*(record(shape, torch.bfloat16, chip) for chip in (86, 89)), 86, 89)


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
def test_the_assembler_keeps_tensor_cores_and_wide_loads(chip):
    for launch in record("small", torch.bfloat16, chip):
        assert_assembled(launch, chip)


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_model_runs_on_tensor_cores_without_spills(shape, chip):
    for launch in record(shape, torch.bfloat16, chip):
        check(launch, chip)


@pytest.mark.prove
def test_running_statistics_of_any_type_are_averaged_on_every_chip():
    with FakeTensorMode():
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            count = torch.empty(1, dtype=torch.promote_types(dtype, torch.float32), device="cuda")
            norms = [count.new_empty(5, 1536)] * 3
            buffers = (
                *count.new_empty(2, 1536).to(dtype),
                count.new_empty((), dtype=torch.int64),
            )
            for chip in CHIPS:
                with record_launches(chip) as launches:
                    update_running_statistics_triton(count, *norms, *buffers, *[None] * 3, *buffers, 0.1, 0.0, 0.1)
                for launch in launches:
                    assert_unspilled(launch, chip)


@pytest.mark.prove
@pytest.mark.parametrize("chip", [80, 90, 100, 120])
def test_float16_is_as_bfloat16(chip):
    for launch in record("small", torch.float16, chip):
        check(launch, chip)


@pytest.mark.prove
@pytest.mark.parametrize("chip", [89, 90, 120])  # 80 takes what 89 does, and has more
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", ["base", "Mix-FFN 56x56x64"])
def test_the_wide_types_fit_the_shared_memory_of_every_chip(shape, dtype, chip):
    for launch in record(shape, dtype, chip):
        assert compile_for_nvidia(launch, chip).shared_bytes <= SHARED_MEMORY[chip]


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
@pytest.mark.parametrize("kernel_size", [5, 7])
def test_larger_kernels_do_not_spill(kernel_size, chip):
    for launch in record("tiny", torch.bfloat16, chip, kernel_size=kernel_size):
        if "depthwise" in launch.kernel.__name__:
            assert_unspilled(launch, chip)


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
def test_what_streams_between_a_librarys_gemms_does_not_spill(chip):
    launches = {launch.kernel.__name__: launch for launch in record("small", torch.bfloat16, chip, backend="library")}
    for name in ("leff_moments_kernel", "leff_slope_kernel"):
        assert_unspilled(launches[name], chip)
        assert compile_for_nvidia(launches[name], chip).wide_loads
    # Its registers are those of four program instances an SM.
    slope = compile_for_nvidia(launches["leff_slope_kernel"], chip)
    assert slope.registers <= 128
    for name in ("leff_moments_kernel", "leff_slope_kernel"):
        assert_reads_behind_tickets(compile_for_nvidia(launches[name], chip).ptx, tickets=2)


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
def test_last_program_instances_read_behind_tickets(chip):
    for launch in record("small", torch.bfloat16, chip):
        if any(part in launch.kernel.__name__ for part in ("expand", "depthwise", "contract")):
            assert_reads_behind_tickets(compile_for_nvidia(launch, chip).ptx, tickets=2)


@pytest.mark.prove
@pytest.mark.parametrize("chip", PROVEN_AMD_CHIPS)
def test_compiles_for_amd_with_matrix_instructions(monkeypatch, chip):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for launch in record("tiny", torch.bfloat16, 90):
        code = compile_for_amd(launch, chip)
        if any(part in launch.kernel.__name__ for part in ("operand", "weight", "hidden", "factored", "expand")):
            assert "v_mfma" in code
