"""What both implementations of the stem take beside images, and the sizes of its maps."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Running", "Stem", "conv_size", "pooled_size"]


class Stem(NamedTuple):
    """Weight (O, I, 7, 7) of the convolution, and vectors (O,) and eps of its norm.

    Without mean and variance the norm takes those of the batch.
    """

    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    variance: Tensor | None
    eps: float


class Running(NamedTuple):
    """What a norm keeps of batches: mean and variance (O,), and how many they were.

    Then the weight of a batch, and the factor that makes its variance that of the population.
    """

    mean: Tensor | None
    variance: Tensor | None
    batches: Tensor | None
    momentum: float
    unbiased: float


def conv_size(size: int) -> int:
    """Side of the convolution's map for a side of the image."""
    return (size - 1) // 2 + 1


def pooled_size(size: int) -> int:
    """Side of the result for a side of the image."""
    return conv_size(conv_size(size))
