"""The dtypes whose products go by panels, each left out where this machine has none."""

import pytest
import torch

from ceit_kernels.common.products import has_panels

needs = {torch.float32: "AVX-512 and oneDNN", torch.bfloat16: "AVX512-BF16 and oneDNN"}


def requires_panels(dtype=torch.float32):
    return pytest.mark.skipif(not has_panels(dtype), reason=f"products with panels of {dtype} need {needs[dtype]}")


with_panels = pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, id=str(dtype), marks=requires_panels(dtype)) for dtype in needs]
)
