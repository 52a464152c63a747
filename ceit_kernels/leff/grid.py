"""The image that a sequence of tokens makes, and the tokens that an image makes."""

from __future__ import annotations

from math import isqrt

from torch import Tensor

from ..common.checks import check_shape

__all__ = ["LAYOUTS", "from_tokens", "residual_to_tokens", "to_tokens", "token_grid"]

LAYOUTS = ("tokens", "NHWC", "NCHW")


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


def to_tokens(
    x: Tensor, channels: int, layout: str, num_prefix_tokens: int, grid_size: tuple[int, int] | None
) -> tuple[Tensor, tuple[int, int]]:
    """Tokens (B, P + H * W, C) and their (H, W), of an input x in one of ``LAYOUTS``.

    Raises:
        ValueError: unknown layout, an input that is not of it, or prefix tokens or another grid for an image.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    if layout == "tokens":
        check_shape("x", x, "B", "N", channels)
        return x, token_grid(x.shape[1], num_prefix_tokens, grid_size)
    check_shape("x", x, *(channels if size == "C" else size for size in layout.replace("N", "B")))
    if num_prefix_tokens:
        raise ValueError(f"num_prefix_tokens: expected 0 with layout {layout!r}, got {num_prefix_tokens}")
    tokens, image_grid = _flatten(x, layout)
    if grid_size is not None and tuple(grid_size) != image_grid:
        raise ValueError(f"grid_size: expected None or {image_grid} like the image x, got {tuple(grid_size)}")
    return tokens, image_grid


def residual_to_tokens(
    residual: Tensor, tokens: Tensor, channels: int, layout: str, grid_size: tuple[int, int]
) -> Tensor:
    """A residual in the layout of the input that makes ``tokens``, as tokens (B, P + H * W, O)."""
    sizes = {"B": tokens.shape[0], "N": tokens.shape[1], "H": grid_size[0], "W": grid_size[1], "C": channels}
    names = "BNC" if layout == "tokens" else layout.replace("N", "B")
    check_shape("residual", residual, *(sizes[name] for name in names))
    return residual if layout == "tokens" else _flatten(residual, layout)[0]


def _flatten(image: Tensor, layout: str) -> tuple[Tensor, tuple[int, int]]:
    image = image.permute(0, 2, 3, 1) if layout == "NCHW" else image
    return image.flatten(1, 2), (image.shape[1], image.shape[2])


def from_tokens(tokens: Tensor, layout: str, grid_size: tuple[int, int]) -> Tensor:
    """Tokens without a prefix back in a layout, without a copy: "NCHW" is channels-last in memory."""
    if layout == "tokens":
        return tokens
    image = tokens.unflatten(1, grid_size)
    return image.permute(0, 3, 1, 2) if layout == "NCHW" else image
