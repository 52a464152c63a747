"""Medians, intervals, verdicts and fitted exponents of measured times."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

# An allowance for what differs between two processes with the same code, such as addresses; chosen, not measured.
MARGIN = 0.03
_RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """A median ratio of times and the interval in which it lies.

    Attributes:
        value: median of the ratios of the rounds.
        low: lower end of the bootstrap interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def cells(self) -> list[str]:
        """The value and the interval, for a table."""
        return [f"{self.value:.2f}", f"{self.low:.2f} to {self.high:.2f}"]


def median_ratio(numerators: Sequence[float], denominators: Sequence[float], confidence: float = 0.99) -> Ratio:
    """Median over the rounds of numerator / denominator, with a bootstrap interval.

    The two times of a round were taken one after the other, so what slows the machine for a while cancels.

    Args:
        numerators: seconds, one for each round.
        denominators: seconds, one for each round.
        confidence: probability of the interval.

    Raises:
        ValueError: no rounds, unequal numbers of rounds, or a time that is not positive.
    """
    if not numerators or len(numerators) != len(denominators):
        raise ValueError(
            f"denominators: expected as many rounds as numerators, at least one, got {len(denominators)} and "
            f"{len(numerators)}"
        )
    if min(*numerators, *denominators) <= 0:
        raise ValueError("numerators, denominators: expected times above 0")
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    generator = random.Random(0)
    medians = sorted(median(generator.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    tail = int((1 - confidence) / 2 * _RESAMPLES)
    return Ratio(median(ratios), medians[tail], medians[-1 - tail])


def verdict(ratio: Ratio, margin: float = MARGIN) -> str:
    """What new time / old time says: "slower" or "faster" where the whole interval lies beyond the margin.

    Args:
        ratio: of the new time to the old.
        margin: relative difference that counts as noise.

    Returns:
        "slower", "faster" or "no difference beyond the noise".
    """
    if ratio.low > 1 + margin:
        return "slower"
    if ratio.high < 1 / (1 + margin):
        return "faster"
    return "no difference beyond the noise"


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent p of values ~ sizes ** p, by least squares of the logarithms.

    Raises:
        ValueError: fewer than two different sizes, or a number that is not positive.
    """
    if len(sizes) != len(values) or len(set(sizes)) < 2 or min(*sizes, *values) <= 0:
        raise ValueError(f"sizes, values: expected two or more different positive pairs, got {sizes} and {values}")
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
