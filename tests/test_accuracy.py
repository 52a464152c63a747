"""The error rule that kernels are judged by."""

import pytest
import torch
from support.accuracy import assert_as_accurate_over_draws

EXACT = torch.ones(4, dtype=torch.float64)


def draw(fused_error, plain_error):
    return [(EXACT + fused_error).float()], [(EXACT + plain_error).float()], [EXACT]


ALIKE, OURS_JUMPS, PLAIN_JUMPS = draw(1e-3, 1e-3), draw(1.0, 1e-6), draw(1e-6, 1.0)


@pytest.mark.parametrize(
    ("draws", "holds"),
    [
        ([ALIKE] * 4, True),
        ([draw(5e-3, 1e-3)] * 4, False),
        ([draw(5e-3, 1e-3)] * 4 + [PLAIN_JUMPS] * 9, False),
        ([OURS_JUMPS] * 8 + [ALIKE] * 4, False),
        ([OURS_JUMPS] * 8 + [PLAIN_JUMPS] * 3 + [ALIKE] * 4, False),
        ([OURS_JUMPS] * 8 + [PLAIN_JUMPS] * 4 + [ALIKE] * 4, True),
        ([OURS_JUMPS] * 8 + [PLAIN_JUMPS] * 4 + [draw(5e-3, 1e-3)] * 9, False),
    ],
)
def test_the_rule_counts_jumps_and_judges_what_has_a_size(draws, holds):
    if holds:
        assert_as_accurate_over_draws(["x"], draws, with_jumps=True)
    else:
        with pytest.raises(AssertionError, match="x: errors are"):
            assert_as_accurate_over_draws(["x"], draws, with_jumps=True)


def test_jumps_count_as_errors_where_draws_should_have_none():
    with pytest.raises(AssertionError, match="x: errors are"):
        assert_as_accurate_over_draws(["x"], [OURS_JUMPS] * 8 + [PLAIN_JUMPS] * 4 + [ALIKE] * 4)
