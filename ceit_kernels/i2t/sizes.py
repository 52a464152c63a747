"""Sizes of the stem's maps."""

from __future__ import annotations

__all__ = ["conv_size", "pooled_size"]


def conv_size(size: int) -> int:
    """Side of the convolution's map for a side of the image."""
    return (size - 1) // 2 + 1


def pooled_size(size: int) -> int:
    """Side of the result for a side of the image."""
    return conv_size(conv_size(size))
