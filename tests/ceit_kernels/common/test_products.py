"""Products on the CPU, by the library that PyTorch carries."""

import torch
from support.panels import with_panels
from torch._subclasses import FakeTensorMode

from ceit_kernels.common import products


def test_a_mode_of_fake_tensors_may_be_the_first_to_ask_for_panels():
    expected = [products.has_panels(dtype) for dtype in (torch.float32, torch.bfloat16)]
    products._has_panels.cache_clear()
    with FakeTensorMode():
        assert [products.has_panels(dtype) for dtype in (torch.float32, torch.bfloat16)] == expected


def test_there_are_panels_of_two_dtypes_and_of_pairs_of_terms_in_bfloat16():
    assert not products.has_panels(torch.float64)
    assert not products.has_panels(torch.bfloat16, 8, 7)
    assert products.has_panels(torch.bfloat16, 8) == products.has_panels(torch.bfloat16)
    assert products.has_panels(torch.float32, 7) == products.has_panels(torch.float32)


def test_there_are_none_where_onednn_is_switched_off():
    with torch.backends.mkldnn.flags(enabled=False):
        assert not any(map(products.has_panels, (torch.float32, torch.bfloat16)))


@with_panels
def test_a_panel_has_64_columns_of_a_weight_the_last_filled_up_with_zeros(dtype):
    weight = torch.randn(100, 6).to(dtype)
    found = products.in_panels(weight, 1)
    together = 2 if dtype == torch.bfloat16 else 1
    assert found.shape == (2, 6 // together, 64 * together)
    rows = found.view(2, -1, 64, together).transpose(2, 3).reshape(2, 6, 64)
    assert torch.equal(torch.cat(rows.unbind(), dim=1), torch.nn.functional.pad(weight.t(), (0, 28)))
