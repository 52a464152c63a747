"""What the compilers make of the kernel for every chip."""

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

from ceit_kernels.attention.triton.launch import qkv_gradient_triton
from ceit_kernels.common.launch import record_launches


def record(
    channels, dtype, *, heads=1, tokens=197, queries=197, batch=256, need_qkv=True, bias_dtype=torch.float32,
    out_bias_dtype=torch.float32,
):  # fmt: skip
    """The launch of a call."""
    with FakeTensorMode(), record_launches() as launches:
        k = torch.empty(batch, tokens, heads, channels // heads, dtype=dtype, device="cuda")
        grad_out = None if out_bias_dtype is None else k.new_empty(batch * queries, channels)
        qkv_gradient_triton(k[:, :queries], k, k, grad_out, need_qkv, bias_dtype, out_bias_dtype)
    (launch,) = launches
    return launch


def assert_streams(chip, channels, dtype, **options):
    """Nothing spilled, within the chip's shared memory, rows loaded with 16 bytes a thread."""
    code = compile_for_nvidia(record(channels, dtype, **options), chip)
    assert code.local_bytes == 0, "the kernel spills registers to device memory"
    assert code.shared_bytes <= SHARED_MEMORY[chip]
    assert code.wide_loads or channels % 8


@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
def test_small_in_bfloat16_streams_without_spills(chip):
    assert_streams(chip, 384, torch.bfloat16, heads=6)


def test_the_assembler_keeps_wide_loads():
    assert_assembled(record(384, torch.bfloat16), 90)


def test_cc_86_runs_what_cc_89_does():
    launch = record(384, torch.bfloat16)
    assert_alike([launch], [launch], 86, 89)


VARIANTS = {
    "as is": {},
    "autocast": {"bias_dtype": torch.float32},
    "class token": {"queries": 1},
    "frozen bias": {"bias_dtype": None},
    "frozen bias behind": {"out_bias_dtype": None},
    "frozen biases": {"bias_dtype": None, "out_bias_dtype": None},
    "frozen weight": {"need_qkv": False},
    "one row": {"batch": 1, "tokens": 1, "queries": 1},
}


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("channels", [192, 384, 768, 1024])
def test_every_model_streams_without_spills(channels, variant, chip):
    assert_streams(chip, channels, torch.bfloat16, **{"bias_dtype": torch.bfloat16} | VARIANTS[variant])


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 24, 100, 384, 1000, 2048, 4096])
def test_any_width_and_dtype_streams_without_spills(channels, dtype, chip):
    assert_streams(chip, channels, dtype, bias_dtype=dtype)


@pytest.mark.parametrize("chip", AMD_CHIPS)
def test_compiles_for_amd_where_a_wave_publishes_its_own_stores_alone(monkeypatch, chip):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    launch = record(384, torch.bfloat16)
    assert launch.num_warps == 1
    assert ".vgpr_spill_count: 0" in compile_for_amd(launch, chip)


@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
def test_partial_sums_are_read_behind_a_ticket(chip):
    assert_reads_behind_tickets(compile_for_nvidia(record(384, torch.bfloat16), chip).ptx, tickets=2)
