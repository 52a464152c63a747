"""What ``torch.utils.flop_counter`` counts for operators: the convolutions and matmuls of the plain modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils import flop_counter

__all__ = ["conv_backward_flops", "conv_flops", "matmul_flops", "no_flops", "register_flops"]

Shape = Sequence[int]


def register_flops(operator: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate what gives the FLOPs of an operator, ``"ceit::name"``, from its arguments with shapes for tensors."""
    return flop_counter.register_flop_formula(getattr(torch.ops.ceit, operator.split("::")[1]))


def no_flops(*arguments: object, **options: object) -> int:
    """The FLOPs of an operator without convolutions and matmuls, which PyTorch counts alone."""
    return 0


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
