"""Products on the CPU, by the library that PyTorch carries."""

import torch
from torch._subclasses import FakeTensorMode

from ceit_kernels.common import products


def test_a_mode_of_fake_tensors_may_be_the_first_to_ask_for_panels():
    expected = products.has_panels(torch.float32)
    products._has_panels.cache_clear()
    with FakeTensorMode():
        assert products.has_panels(torch.float32) == expected
    assert not products.has_panels(torch.bfloat16)
