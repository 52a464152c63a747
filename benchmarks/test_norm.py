"""The residual connection and the norm behind it, at the sizes of CeiT-T and CeiT-S at 224x224."""

import pytest
import torch
from contenders import CONTENDERS, DEVICE, DTYPES, PHASES, make_call
from torch import Tensor, nn

from ceit.layers import AddNorm


class Residual(nn.Module):
    """Both uses that a block makes of it, with what is between left out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.add_norm = AddNorm()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x, y, class_token = self.add_norm(x, None, self.norm1, 1)
        x, y = self.add_norm(x, y, self.norm2)
        return torch.cat((x, y, class_token), dim=1)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [192, 384], ids=["tiny", "small"])
def test_add_norm(benchmark, channels, dtype, phase, batch, contender):
    torch.manual_seed(0)
    module = Residual(channels)
    x = torch.randn(batch, 197, channels, device=DEVICE, dtype=dtype, requires_grad=phase == "training")
    benchmark.group = f"add and norm {channels} {phase} {dtype} batch {batch}"
    benchmark(make_call(module, x, contender, phase))
