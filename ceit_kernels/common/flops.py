"""What ``torch.utils.flop_counter`` counts for operators: the convolutions and products of the plain modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils import flop_counter

__all__ = ["convolution", "convolution_backward", "no_flops", "product", "register_flops"]

Shape = Sequence[int]


def register_flops(operator: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate what gives the FLOPs of an operator, ``"ceit::name"``, from its arguments with shapes for tensors."""
    return flop_counter.register_flop_formula(getattr(torch.ops.ceit, operator.split("::")[1]))


def no_flops(*arguments: object, **options: object) -> int:
    """Of an operator without convolutions and products, which PyTorch counts alone."""
    return 0


def product(rows: int, terms: int, columns: int) -> int:
    """Of a product of matrices (rows, terms) and (terms, columns)."""
    return 2 * rows * terms * columns


def convolution(x: Shape, weight: Shape, out: Shape) -> int:
    """Of a convolution of images (B, C, H, W)."""
    return flop_counter.conv_flop_count(list(x), list(weight), list(out))


def convolution_backward(x: Shape, weight: Shape, out: Shape, need_input: bool, need_weight: bool) -> int:
    """Of the gradients of a convolution, as PyTorch counts them, which is too many where it has groups."""

    def turned(shape: Shape) -> list[int]:
        return [shape[1], shape[0], *shape[2:]]

    of_input = flop_counter.conv_flop_count(list(out), list(weight), list(x), transposed=True)
    of_weight = flop_counter.conv_flop_count(turned(x), turned(out), turned(weight))
    return of_input * need_input + of_weight * need_weight
