"""What the compilers make of the kernels for every chip."""

import pytest
import torch
from support.machine_code import (
    AMD_CHIPS,
    DISTINCT_CHIPS,
    SHARED_MEMORY,
    assert_alike,
    assert_assembled,
    compile_for_amd,
    compile_for_nvidia,
)
from torch._subclasses import FakeTensorMode

from ceit_kernels.common.launch import record_launches
from ceit_kernels.tokens.triton import MAX_TENSORS
from ceit_kernels.tokens.triton.launch import column_sums_triton, join_tokens_triton


def record(channels, dtype, *, batch=256, tokens=196, layers=12, into=None, added=True, biases=(1, 4, 1)):
    """The launches of both passes for images' tokens, then of those for layers' tokens."""
    into = into or dtype
    with FakeTensorMode(), record_launches() as launches:
        x = torch.empty(batch, tokens, channels, dtype=dtype, device="cuda")
        positions, prefix = x.new_empty(1, 1 + tokens, channels, dtype=into), x.new_empty(1, 1, channels, dtype=into)
        none = [None] * (MAX_TENSORS - 2)
        joined = join_tokens_triton(positions, None, prefix, x, *none, True, into)
        column_sums_triton(joined, None, None, None, into, None, None, None, into, dtype)
        layer = x.new_empty(batch, 1, channels)
        none, positions = [None] * (MAX_TENSORS - layers), positions[:, :1].expand(1, layers, channels)
        call = positions, layer if added else None, *[layer] * layers, *none
        joined = join_tokens_triton(*call, False, into)
        given = [n and x.new_empty(batch, n * channels) for n in biases]
        column_sums_triton(joined, *given, into, *(n and into for n in biases), None, None)
    return launches


def assert_all_stream(chip, channels, dtype, **options):
    """Nothing spilled, within the chip's shared memory, loaded with 16 bytes a thread."""
    for launch in record(channels, dtype, **options):
        code = compile_for_nvidia(launch, chip)
        assert code.local_bytes == 0, f"{launch.kernel.__name__} spills registers to device memory"
        assert code.shared_bytes <= SHARED_MEMORY[chip]
        assert code.wide_loads or channels % 16


@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
def test_small_in_bfloat16_streams_without_spills(chip):
    assert_all_stream(chip, 384, torch.bfloat16)


def test_the_assembler_keeps_wide_loads():
    for launch in record(384, torch.bfloat16):
        assert_assembled(launch, 90)


def test_cc_86_runs_what_cc_89_does():
    launches = record(384, torch.bfloat16)
    assert_alike(launches, launches, 86, 89)


VARIANTS = {
    "as is": {},
    "autocast": {"into": torch.float32},
    "frozen biases": {"biases": (None, None, 4)},
    "as many layers as there may be": {"layers": MAX_TENSORS, "added": False},
    "one image": {"batch": 1},
    "384 pixels": {"tokens": 576},
}


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("channels", [192, 384, 768])
def test_every_model_streams_without_spills(channels, variant, chip):
    assert_all_stream(chip, channels, torch.bfloat16, **VARIANTS[variant])


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 24, 100, 384, 1000, 4096])
def test_any_width_and_dtype_streams_without_spills(channels, dtype, chip):
    assert_all_stream(chip, channels, dtype)


@pytest.mark.parametrize("chip", AMD_CHIPS)
def test_compiles_for_amd(monkeypatch, chip):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for launch in record(384, torch.bfloat16):
        assert ".vgpr_spill_count: 0" in compile_for_amd(launch, chip)
