"""The image that a sequence of tokens makes."""

from __future__ import annotations

from math import isqrt

__all__ = ["token_grid"]


def token_grid(tokens: int, num_prefix_tokens: int, grid_size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the image behind the prefix tokens.

    Args:
        tokens: tokens in all, ``num_prefix_tokens + H * W``.
        num_prefix_tokens: tokens before the image's.
        grid_size: (H, W); a square if None.

    Raises:
        ValueError: the tokens make no such image.
    """
    image_tokens = tokens - num_prefix_tokens
    if grid_size is None:
        # Not reached with a grid given, so that compilation with dynamic shapes meets no integer root.
        height = width = isqrt(max(image_tokens, 0))
        expected = "a square number of"
    else:
        height, width = grid_size
        expected = f"grid_size {height} * {width} = {height * width}"
    if image_tokens < 1 or height * width != image_tokens:
        raise ValueError(
            f"x: expected {num_prefix_tokens} prefix and {expected} patch tokens, got {tokens} tokens in all"
        )
    return height, width
