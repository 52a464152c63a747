from math import comb

import pytest

from benchmarks.harness.statistics import Ratio, fit_exponent, median_ratio, verdict


def noisy(median, rounds=30):
    return [median * (1 + 0.02 * ((7 * i) % 11 - 5) / 5) for i in range(rounds)]


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.5, "slower"), (0.6, "faster"), (1.0, "no difference beyond the noise")]
)
def test_verdict_of_measured_times(factor, expected):
    base = noisy(1e-3)
    head = [factor * t for t in reversed(base)]
    assert verdict(median_ratio(head, base)) == expected


def test_wide_interval_gives_no_verdict():
    assert verdict(Ratio(1.4, 0.98, 1.9)) == "no difference beyond the noise"


def test_slow_phase_of_the_machine_cancels():
    drift = [1.0] * 10 + [3.0] * 10
    ratio = median_ratio([1.2 * d for d in drift], drift)
    assert ratio.value == pytest.approx(1.2)
    assert ratio.low == pytest.approx(1.2)


def test_the_interval_leaves_out_half_a_percent_at_each_end():
    """The median of n draws from 1 to n is at most k as often as n // 2 + 1 of them are, a binomial probability."""
    n = 301
    found = median_ratio([float(k) for k in range(1, n + 1)], [1.0] * n)

    def at_most(k):
        return sum(comb(n, i) * (k / n) ** i * (1 - k / n) ** (n - i) for i in range(n // 2 + 1, n + 1))

    low = next(k for k in range(1, n) if at_most(k) >= 0.005)
    assert abs(found.low - low) <= 1
    assert abs(found.high - (n + 1 - low)) <= 1


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0])])
def test_median_ratio_refuses(a, b):
    with pytest.raises(ValueError, match="expected"):
        median_ratio(a, b)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_exponent(exponent):
    sizes = [1, 2, 4, 8]
    assert fit_exponent(sizes, [3 * n**exponent for n in sizes]) == pytest.approx(exponent)


def test_exponent_needs_two_sizes():
    with pytest.raises(ValueError, match="two or more"):
        fit_exponent([4, 4], [1.0, 2.0])
