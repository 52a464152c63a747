"""The locally-enhanced feed-forward block of CeiT-T and CeiT-S at 224x224."""

import pytest
import torch
from contenders import CONTENDERS, DEVICE, DTYPES, PHASES, make_call

from ceit.layers import LocallyEnhancedFeedForward

BATCHES = (1, 256) if DEVICE == "cuda" else (1, 16)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [192, 384], ids=["tiny", "small"])
def test_leff(benchmark, channels, dtype, phase, batch, contender):
    torch.manual_seed(0)
    module = LocallyEnhancedFeedForward(channels, 4 * channels)
    x = torch.randn(batch, 197, channels, device=DEVICE, dtype=dtype)
    benchmark.group = f"LeFF {channels} {phase} {dtype} batch {batch}"
    benchmark.pedantic(make_call(module, x, contender, phase), rounds=10, warmup_rounds=2)
