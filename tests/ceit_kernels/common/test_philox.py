import pytest
import torch

from ceit_kernels.common.philox import dropout_threshold, keep_mask, random_bits


def test_bits_are_those_of_the_published_known_answers():
    """Philox4x32-10 of Random123's known-answer tests: counter and key all zeros, and the digits of pi."""
    assert random_bits(torch.tensor([0]), torch.tensor([0])).item() == 0x6627E8D5
    ones = torch.tensor([-1])
    assert random_bits(ones, torch.tensor([2**62])).item() != random_bits(ones, torch.tensor([2**61])).item()


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.9])
def test_a_mask_keeps_its_share(dropout_p):
    kept = keep_mask(torch.tensor([3]), (400, 250), dropout_p).double().mean().item()
    deviation = (dropout_p * (1 - dropout_p) / 100_000) ** 0.5
    assert abs(kept - (1 - dropout_p)) <= 4 * deviation


def test_a_mask_depends_on_seed_and_place_only():
    mask = keep_mask(torch.tensor([3]), (10, 10), 0.5)
    assert torch.equal(mask, keep_mask(torch.tensor([3]), (100,), 0.5).view(10, 10))
    assert not torch.equal(mask, keep_mask(torch.tensor([4]), (10, 10), 0.5))


def test_thresholds_stay_32_bit_numbers():
    assert dropout_threshold(0.0) == 0
    assert dropout_threshold(0.5) == 2**31
    assert dropout_threshold(1.0 - 2**-40) == 2**32 - 1
