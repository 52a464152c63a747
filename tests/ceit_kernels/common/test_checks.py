"""What tensors of a norm plain PyTorch takes, and what it lacks."""

import pytest
import torch

from ceit_kernels.common.checks import norm_dtype_reason

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("dtype", "kinds", "given"),
    [
        (SINGLE, [SINGLE], None),
        (BRAIN, [SINGLE], None),
        (BRAIN, [BRAIN], None),
        (HALF, [], None),
        (HALF, [BRAIN], "torch.bfloat16"),
        (SINGLE, [DOUBLE], "torch.float64"),
        (DOUBLE, [SINGLE], "torch.float32"),
        (BRAIN, [SINGLE, BRAIN], "torch.bfloat16 and torch.float32"),
    ],
    ids=str,
)
def test_a_norm_is_in_the_dtype_of_its_numbers_or_all_in_float32(dtype, kinds, given):
    reason = norm_dtype_reason("bn2", dtype, None, *(torch.ones(1, dtype=kind) for kind in kinds))
    assert reason == (given and f"bn2 has tensors of {given} for numbers of {dtype}")
