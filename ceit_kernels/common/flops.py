"""What ``torch.utils.flop_counter`` counts for operators: the convolutions and matmuls of the plain modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils import flop_counter

__all__ = ["conv_backward_flops", "conv_flops", "matmul_flops"]

Shape = Sequence[int]


def matmul_flops(rows: int, terms: int, columns: int) -> int:
    """FLOPs of a matmul (rows, terms) x (terms, columns)."""
    return 2 * rows * terms * columns


def conv_flops(x: Shape, weight: Shape, out: Shape) -> int:
    """FLOPs of a convolution of images (B, C, H, W)."""
    return flop_counter.conv_flop_count(list(x), list(weight), list(out))


def conv_backward_flops(x: Shape, weight: Shape, out: Shape, need_input: bool, need_weight: bool) -> int:
    """FLOPs of the gradients of a convolution, as PyTorch counts them, which is too many where it has groups."""

    def turned(shape: Shape) -> list[int]:
        return [shape[1], shape[0], *shape[2:]]

    of_input = flop_counter.conv_flop_count(list(out), list(weight), list(x), transposed=True)
    of_weight = flop_counter.conv_flop_count(turned(x), turned(out), turned(weight))
    return of_input * need_input + of_weight * need_weight
