"""What the compilers make of the kernels for every chip, and how much a call launches."""

import pytest
import torch
from support.machine_code import (
    AMD_CHIPS,
    DISTINCT_CHIPS,
    SHARED_MEMORY,
    assert_alike,
    assert_assembled,
    assert_reads_behind_tickets,
    compile_for_amd,
    compile_for_nvidia,
)
from torch._subclasses import FakeTensorMode

from ceit_kernels.add_norm.triton.launch import add_norm_backward_triton, add_norm_forward_triton
from ceit_kernels.common.launch import record_launches

CHANNELS = (192, 384, 768, 1024)


def record(
    channels,
    dtype,
    *,
    shape=(256, 197),
    branch_dtype=None,
    has_branch=True,
    out_dtype=None,
    weight_dtype=None,
    prefix=0,
    has_rest=True,
    affine=True,
    needs=(True, True, True),
):
    """The launches of a forward and of a backward call."""
    with FakeTensorMode(), record_launches() as forward:
        x = torch.empty(*shape, channels, dtype=dtype, device="cuda")
        branch = torch.empty_like(x, dtype=branch_dtype) if has_branch else None
        weight = torch.empty(channels, dtype=weight_dtype or dtype, device="cuda") if affine else None
        bias = None if weight is None else torch.empty_like(weight)
        total, out, first, mean, rstd, tickets = add_norm_forward_triton(
            x, branch, weight, bias, 1e-6, prefix, True, out_dtype or dtype
        )
        with record_launches() as backward:
            total = x if total is None else total
            rest = total if has_rest else None
            add_norm_backward_triton(
                out, rest, first, total, weight, bias, mean, rstd, tickets, *needs, last=prefix < 0
            )
    return forward, backward


def assert_streams(launch, chip, wide_loads=True):
    """Nothing spilled, within the chip's shared memory, rows loaded with 16 bytes a thread."""
    code = compile_for_nvidia(launch, chip)
    assert code.local_bytes == 0, f"{launch.kernel.__name__} spills registers to device memory"
    assert code.shared_bytes <= SHARED_MEMORY[chip]
    assert code.wide_loads or not wide_loads


def assert_all_stream(chip, *args, wide_loads=True, **options):
    forward, backward = record(*args, **options)
    for launch in forward + backward:
        assert_streams(launch, chip, wide_loads)


@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
def test_small_in_bfloat16_streams_without_spills(chip):
    assert_all_stream(chip, 384, torch.bfloat16)


def test_the_assembler_keeps_wide_loads():
    for launches in record(384, torch.bfloat16):
        for launch in launches:
            assert_assembled(launch, 90)


def test_cc_86_runs_what_cc_89_does():
    for launches in record(384, torch.bfloat16):
        assert_alike(launches, launches, 86, 89)


VARIANTS = {
    "as is": {},
    "no branch": {"has_branch": False},
    "class token": {"has_branch": False, "prefix": 1},
    "last token": {"has_branch": False, "prefix": -1},
    "norm alone": {"has_branch": False, "has_rest": False},
    "no weight": {"affine": False, "needs": (True, False, False)},
    "frozen weight": {"needs": (True, False, False)},
    "frozen input": {"needs": (False, True, True)},
    "one row": {"shape": (1, 1)},
}


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_every_model_streams_without_spills(channels, variant, chip):
    assert_all_stream(chip, channels, torch.bfloat16, **VARIANTS[variant])


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_every_dtype_streams_without_spills(channels, dtype, chip):
    assert_all_stream(chip, channels, dtype, prefix=1)


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_autocast_streams_without_spills(channels, chip):
    assert_all_stream(chip, channels, torch.float32, branch_dtype=torch.bfloat16)
    float32 = {"out_dtype": torch.float32, "weight_dtype": torch.float32}
    assert_all_stream(chip, channels, torch.bfloat16, prefix=1, **float32)


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 24, 100, 2048, 4096])
def test_any_width_streams_without_spills(channels, dtype, chip):
    assert_all_stream(chip, channels, dtype, prefix=1, wide_loads=channels % 8 == 0)


@pytest.mark.parametrize("chip", AMD_CHIPS)
def test_compiles_for_amd_where_a_wave_publishes_its_own_stores_alone(monkeypatch, chip):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    forward, backward = record(384, torch.bfloat16, prefix=1)
    assert backward[0].num_warps == 1
    for launch in forward + backward:
        assert ".vgpr_spill_count: 0" in compile_for_amd(launch, chip)


def test_a_call_makes_one_launch_forward_and_one_backward():
    names = [[launch.kernel.__name__ for launch in part] for part in record(384, torch.bfloat16)]
    assert names == [["add_norm_forward_kernel"], ["add_norm_backward_kernel"]]


@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
def test_partial_sums_are_read_behind_a_ticket(chip):
    _, (backward,) = record(384, torch.bfloat16)
    assert_reads_behind_tickets(compile_for_nvidia(backward, chip).ptx, tickets=2)
