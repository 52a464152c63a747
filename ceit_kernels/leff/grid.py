"""The image that a sequence of tokens makes, and the tokens that an image makes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.checks import check_shape

__all__ = [
    "LAYOUTS",
    "check_grid_size",
    "empty_tokens_like",
    "from_tokens",
    "in_memory_order",
    "is_planar",
    "residual_to_tokens",
    "to_tokens",
    "token_grid",
]

LAYOUTS = ("tokens", "NHWC", "NCHW")


def token_grid(tokens: int, num_prefix_tokens: int, grid_size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the image behind the prefix tokens.

    Args:
        tokens: tokens in all, ``num_prefix_tokens + H * W``.
        num_prefix_tokens: tokens before the image's.
        grid_size: (H, W); a square if None.

    Raises:
        ValueError: the tokens make no such image, or ``grid_size`` is no pair of positive numbers.
        TypeError: ``grid_size`` is no pair of integers.
    """
    image_tokens = tokens - num_prefix_tokens
    if grid_size is None:
        # As a root of real numbers, which graphs with sizes that may change have too; it is exact for squares.
        height = width = int(max(image_tokens, 0) ** 0.5)
        expected = "a square number of"
    else:
        if not torch.jit.is_scripting():
            _check_pair(grid_size)
        height, width = grid_size
        expected = f"grid_size {height} * {width} = {height * width}"
        if height < 1 or width < 1:
            raise ValueError(f"grid_size: expected two positive integers, got ({height}, {width})")
    if image_tokens < 1 or height * width != image_tokens:
        raise ValueError(
            f"x: expected {num_prefix_tokens} prefix and {expected} patch tokens, got {tokens} tokens in all"
        )
    return height, width


@torch.jit.unused
def _check_pair(grid_size: tuple[int, int]) -> None:
    """Only a pair of integers says how large a grid is."""
    if not isinstance(grid_size, (tuple, list)):
        raise TypeError(f"grid_size: expected two positive integers, got {grid_size!r}")
    if len(grid_size) != 2:
        raise ValueError(f"grid_size: expected two positive integers, got {tuple(grid_size)}")
    for size in grid_size:
        if not hasattr(size, "__index__"):
            raise TypeError(f"grid_size: expected two positive integers, got {tuple(grid_size)}")


def check_grid_size(grid_size: tuple[int, int], image: tuple[int, int]) -> None:
    """Raise ``ValueError`` unless a grid is that of an image."""
    if grid_size[0] != image[0] or grid_size[1] != image[1]:
        raise ValueError(f"grid_size: expected None or {image} like the image x, got {grid_size}")


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
    if grid_size is not None:
        _check_pair(grid_size)
        check_grid_size(grid_size, image_grid)
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
    if layout == "NCHW":
        image = (image if _is_channels_last(image) else image.contiguous()).permute(0, 2, 3, 1)
    return image.flatten(1, 2), (image.shape[1], image.shape[2])


def from_tokens(tokens: Tensor, layout: str, grid_size: tuple[int, int], x: Tensor) -> Tensor:
    """Tokens without a prefix back in the layout of the input x, and as x is in memory."""
    if layout == "tokens":
        return tokens
    image = tokens.unflatten(1, grid_size)
    if layout == "NHWC":
        return image
    image = image.permute(0, 3, 1, 2)
    return image if _is_channels_last(x) else image.contiguous()


def _is_channels_last(image: Tensor) -> bool:
    return image.is_contiguous(memory_format=torch.channels_last)


def is_planar(x: Tensor) -> bool:
    """Whether tokens (B, N, C) are those of an image in planes, (B, C, N) in memory, which inference takes as it is."""
    return not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


def in_memory_order(tokens: Tensor, planar: bool) -> Tensor:
    """Tokens that are in memory as those of an image in planes, or token by token."""
    return tokens.transpose(1, 2).contiguous().transpose(1, 2) if planar else tokens.contiguous()


def empty_tokens_like(x: Tensor, channels: int, dtype: torch.dtype, planar: bool, rows: int | None = None) -> Tensor:
    """New tokens (B, rows, channels) for x (B, N, C), N rows by default."""
    batch, rows = x.shape[0], x.shape[1] if rows is None else rows
    if planar:
        return x.new_empty((batch, channels, rows), dtype=dtype).transpose(1, 2)
    return x.new_empty((batch, rows, channels), dtype=dtype)
