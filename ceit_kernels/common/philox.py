"""Counter-based random bits, the same in PyTorch as in a Triton kernel's ``tl.randint``.

A dropout mask is a function of a seed and of an element's index, so backward, gradient checkpointing and every backend
replay it without storing it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dropout_threshold", "keep_mask", "random_bits"]

_LOW = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def random_bits(seed: Tensor, index: Tensor) -> Tensor:
    """32 random bits for every index: Philox4x32-10 (Salmon et al., SC 2011), first word.

    Args:
        seed: int64 of shape (1,).
        index: int64, any shape, not negative.

    Returns:
        int64 of the shape of ``index``, from 0 to 2**32 - 1.
    """
    c0, c1 = index & _LOW, (index >> 32) & _LOW
    c2, c3 = torch.zeros_like(index), torch.zeros_like(index)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        # The multiplication wraps around as int64, but its 64 bits are right: shift, then mask the copies of the sign.
        a, b = c0 * _MULTIPLIER_A, c2 * _MULTIPLIER_B
        c0, c1 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW
        c2, c3 = ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    return c0


def dropout_threshold(dropout_p: float) -> int:
    """The number below which 32 random bits mean "drop", for a drop probability in [0, 1)."""
    return min(round(dropout_p * 2**32), 2**32 - 1)


def keep_mask(seed: Tensor, shape: tuple[int, ...], dropout_p: float) -> Tensor:
    """Bool of ``shape``, true with probability ``1 - dropout_p``; an element's index is its place in C order."""
    numel = 1
    for size in shape:
        numel *= size
    index = torch.arange(numel, dtype=torch.int64, device=seed.device).view(shape)
    return random_bits(seed, index) >= dropout_threshold(dropout_p)
