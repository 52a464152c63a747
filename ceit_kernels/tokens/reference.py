"""The operators in plain PyTorch: what the kernels are checked against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["column_sums_reference", "join_tokens_reference"]


def join_tokens_reference(positions: Tensor, tokens: Sequence[Tensor], added: Tensor | None = None) -> Tensor:
    """Tokens (B, n, C) in a row, of which all images share (1, 1, C), with positions (1, N, C) added.

    What is ``added`` is so to the last of the tensors.
    """
    *others, last = tokens
    last = last if added is None else last + added
    return torch.cat([*(tensor.expand(last.shape[0], -1, -1) for tensor in others), last], dim=1) + positions


def column_sums_reference(
    rows: Tensor | None,  # (B, N, C)
    rows1: Tensor | None,  # (B, F)
    rows2: Tensor | None,
    rows3: Tensor | None,
    *dtypes: torch.dtype | None,
) -> list[Tensor | None]:
    """Sums over B as vectors, each of its dtype; the sum (C,) of the first of N, and the others (B, N - 1, C)."""
    first = None if rows is None else rows[:, 0]
    found = [
        None if matrix is None or dtype is None else matrix.sum(0).reshape(-1).to(dtype)
        for matrix, dtype in zip((rows, rows1, rows2, rows3, first), dtypes, strict=False)
    ]
    return [*found, None if rows is None or dtypes[-1] is None else rows[:, 1:].to(dtypes[-1])]
