"""Class-token attention across the layers of CeiT-T and CeiT-S."""

import pytest
import torch
from contenders import CONTENDERS, DEVICE, DTYPES, PHASES, make_call

from ceit.layers import LCAAttention


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "heads"), [(192, 3), (384, 6)], ids=["tiny", "small"])
def test_lca_attention(benchmark, channels, heads, dtype, phase, batch, contender):
    torch.manual_seed(0)
    module = LCAAttention(channels, heads, qkv_bias=True)
    x = torch.randn(batch, 12, channels, device=DEVICE, dtype=dtype)
    benchmark.group = f"LCA {channels} {phase} {dtype} batch {batch}"
    benchmark(make_call(module, x, contender, phase))
