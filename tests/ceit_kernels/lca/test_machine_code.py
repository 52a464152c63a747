"""What the compilers make of the kernels for every chip, and how much a call launches and moves."""

from math import prod

import pytest
import torch
from support.machine_code import (
    AMD_CHIPS,
    DISTINCT_CHIPS,
    SHARED_MEMORY,
    assert_alike,
    assert_assembled,
    assert_efficient,
    compile_for_amd,
    compile_for_nvidia,
)
from torch._subclasses import FakeTensorMode

from ceit_kernels.common.launch import record_launches
from ceit_kernels.lca.triton.launch import lca_backward_triton, lca_forward_triton

MODELS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # channels, heads


def record(
    channels,
    heads,
    dtype,
    *,
    batch=256,
    layers=12,
    weight_dtype=None,
    bias=True,
    dropout_p=0.0,
    need_input=True,
    need_weight=True,
):
    """The launches of a forward and of a backward call."""
    with FakeTensorMode(), record_launches() as forward:
        x = torch.empty(batch, layers, channels, dtype=dtype, device="cuda")
        weight = torch.empty(3 * channels, channels, dtype=weight_dtype or dtype, device="cuda")
        parameters = (weight, torch.empty_like(weight[:, 0]) if bias else None)
        seed = torch.empty(1, dtype=torch.int64, device="cuda")
        out = lca_forward_triton(x, *parameters, seed, heads, 0.125, dropout_p, dtype)
        with record_launches() as backward:
            settings = (heads, 0.125, dropout_p, dtype, need_input, need_weight)
            lca_backward_triton(out, x, *parameters, seed, *settings)
    return forward, backward


def record_all(*args, **kwargs):
    forward, backward = record(*args, **kwargs)
    return forward + backward


def test_small_in_bfloat16_runs_on_tensor_cores_without_spills():
    for launch in record_all(*MODELS["small"], torch.bfloat16):
        assert_efficient(launch, 90)
        assert_assembled(launch, 90)


@pytest.mark.prove
@pytest.mark.parametrize("model", MODELS)
def test_cc_86_runs_what_cc_89_does(model):
    launches = record_all(*MODELS[model], torch.bfloat16)
    assert_alike(launches, launches, 86, 89)


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
def test_the_assembler_keeps_tensor_cores_and_wide_loads(chip):
    for launch in record_all(*MODELS["small"], torch.bfloat16):
        assert_assembled(launch, chip)


VARIANTS = {
    "as is": {},
    "float32 weights": {"weight_dtype": torch.float32},
    "dropout": {"dropout_p": 0.1},
    "no bias": {"bias": False},
    "24 layers": {"layers": 24},
    "128 layers": {"layers": 128},
    "batch 1": {"batch": 1},
}


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
@pytest.mark.parametrize(
    ("model", "dtype", "variant"),
    # The models differ in how long loops are.
    [(model, dtype, "as is") for model in MODELS for dtype in (torch.bfloat16, torch.float16)]
    + [("small", torch.bfloat16, variant) for variant in VARIANTS if variant != "as is"],
    ids=str,
)
def test_every_model_runs_on_tensor_cores_without_spills(model, dtype, variant, chip):
    for launch in record_all(*MODELS[model], dtype, **VARIANTS[variant]):
        assert_efficient(launch, chip)


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
@pytest.mark.parametrize("head_dim", [8, 24, 96, 128, 256])
def test_any_head_size_runs_on_tensor_cores_without_spills(head_dim, chip):
    for launch in record_all(2 * head_dim, 2, torch.bfloat16):
        assert_efficient(launch, chip, wide_loads=head_dim >= 64)


@pytest.fixture(params=[True, False], ids=["tf32", "ieee"])
def allow_tf32(request):
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.prove
@pytest.mark.parametrize("chip", DISTINCT_CHIPS)
def test_float32_follows_allow_tf32_without_spills(allow_tf32, chip):
    for launch in record_all(*MODELS["small"], torch.float32):
        assert_efficient(launch, chip, tensor_cores=allow_tf32)


@pytest.mark.prove
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("layers", "head_dim"), [(128, 256), (12, 256), (12, 64)])
def test_the_extremes_of_the_wide_types_fit_the_shared_memory_of_every_chip(dtype, layers, head_dim):
    for launch in record_all(2 * head_dim, 2, dtype, layers=layers):
        for chip in DISTINCT_CHIPS[1:]:  # 80 takes what 89 does, and has more
            assert compile_for_nvidia(launch, chip).shared_bytes <= SHARED_MEMORY[chip]


@pytest.mark.parametrize("chip", AMD_CHIPS)
def test_compiles_for_amd_with_matrix_instructions(chip):
    for launch in record_all(*MODELS["small"], torch.bfloat16):
        assembler = compile_for_amd(launch, chip)
        assert "v_mfma" in assembler
        assert ".vgpr_spill_count: 0" in assembler


def test_a_call_makes_one_launch_forward_and_at_most_three_backward():
    """With the projection around it: 2 kernels for inference and 2 + 6 for training, against 3 and 8 budgeted."""
    names = [[launch.kernel.__name__ for launch in part] for part in record(*MODELS["small"], torch.bfloat16)]
    scores, inputs, weights = (f"lca_backward_{part}_kernel" for part in ("scores", "input", "weight"))
    assert names == [["lca_forward_kernel"], [scores, inputs, weights]]
    for needs, expected in {(True, False): [scores, inputs], (False, True): [scores, weights]}.items():
        options = dict(zip(("need_input", "need_weight"), needs, strict=True))
        _, backward = record(*MODELS["small"], torch.bfloat16, **options)
        assert [launch.kernel.__name__ for launch in backward] == expected


def test_no_launch_moves_more_than_its_inputs_and_results():
    """The largest intermediate is (B, C): neither keys, values nor anything of (B, L, C) but x and its gradient."""
    channels, heads = MODELS["small"]
    launches = record_all(channels, heads, torch.bfloat16)
    tensors = [
        (name, value)
        for launch in launches
        for name, value in launch.arguments.items()
        if isinstance(value, torch.Tensor)
    ]
    tokens = 256 * 12 * channels
    for name, tensor in tensors:
        if name not in ("p_x", "p_dx", "p_weight", "p_dweight"):
            assert tensor.numel() <= 256 * channels, name
    assert sum(prod(tensor.shape) * tensor.itemsize for _, tensor in tensors) <= 7 * 2 * tokens
