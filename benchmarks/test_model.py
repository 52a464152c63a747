"""Whole models of the CeiT family at 224x224."""

import pytest
import torch
from contenders import CONTENDERS, DEVICE, DTYPES, PHASES, make_call

import ceit

BATCHES = {"inference": (1, 16), "training": (8,)}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(("phase", "batch"), [(phase, batch) for phase in PHASES for batch in BATCHES[phase]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["ceit_tiny_patch16_224", "ceit_small_patch16_224"])
def test_model(benchmark, name, dtype, phase, batch, contender):
    torch.manual_seed(0)
    model = ceit.create_model(name, fused=False)
    x = torch.randn(batch, 3, 224, 224, device=DEVICE, dtype=dtype)
    benchmark.group = f"{name} {phase} {dtype} batch {batch}"
    benchmark.pedantic(make_call(model, x, contender, phase), rounds=5, warmup_rounds=1)
