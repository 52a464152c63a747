"""What the launches of LeFF's kernels share: sizes, parameters, buffers, tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.launch import cdiv, launch, target_chip
from ...common.plan import buffer, compute, without_plan
from ...common.precision import precision_arguments
from ...common.tuning import Tiles, tuned_tiles
from ..arguments import Settings, parameters_per_layer

__all__ = [
    "ROWS",
    "SMS",
    "Call",
    "Layer",
    "even_parts",
    "groups_of",
    "linear",
    "linear_input_gradient",
    "linear_weight_gradient",
]

Result = TypeVar("Result")
ROWS = 512  # tokens of which a program instance of a kernel that streams takes sums
SMS = 132  # of an H100


def even_parts(tokens: int, most: int, step: int) -> tuple[int, int]:
    """The tokens of a part, a multiple of ``step``, and the number of parts, which is at most ``most``."""
    rows = cdiv(cdiv(tokens, most), step) * step
    return rows, cdiv(tokens, rows)


def groups_of(parts: int) -> tuple[int, int]:
    """How many parts are summed first where the last program instance takes the sums, and how many such groups."""
    group = isqrt(parts - 1) + 1
    return group, cdiv(parts, group)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A pointwise layer by PyTorch's GEMM."""
    return F.linear(x.to(dtype), weight.flatten(1).to(dtype), None if bias is None else bias.to(dtype))


def linear_input_gradient(gradient: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a pointwise layer's input, of all rows of tokens."""
    return gradient.flatten(0, -2).to(dtype) @ weight.flatten(1).to(dtype)


def linear_weight_gradient(gradient: Tensor, operand: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a pointwise layer's weight from that of its output, and its input."""
    return (gradient.flatten(0, -2).t().to(operand.dtype) @ operand).view(weight.shape).to(weight.dtype)


class Layer(NamedTuple):
    """A convolution and its norm, the tensors in the order of the registered operators."""

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


class Call:
    """What a call computes, by the names that the kernels have.

    Args:
        x: tokens (B, P + H * W, C), contiguous.
        parameters: the tensors of ``arguments.PARAMETER_NAMES``, contiguous.
        settings: of the call.

    Attributes:
        layers: the three layers.
        dtype: of the GEMMs.
        acc_dtype: of accumulators and statistics.
        M, C, E, O: image tokens of the batch; channels of the input, in between and of the output.
        kernel_size: side of the depthwise kernels.
        chip: compute capability, times ten.
        known: arguments of kernels by name, each of which means one thing in all of them.
    """

    def __init__(self, x: Tensor, parameters: Sequence[Tensor | None], settings: Settings) -> None:
        firsts = range(0, len(parameters), parameters_per_layer)
        self.layers = [Layer(*parameters[i : i + parameters_per_layer]) for i in firsts]
        self.x, self.settings, self.chip = x, settings, target_chip(x)
        self.dtype = settings.compute_dtype or x.dtype
        self.acc_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        batch, height, width = x.shape[0], settings.height, settings.width
        weight1, weight2, weight3 = (layer.weight for layer in self.layers)
        self.M, self.C, self.E, self.O = batch * height * width, x.shape[2], weight1.shape[0], weight3.shape[0]
        self.kernel_size = weight2.shape[-1]
        self.known = {
            **precision_arguments(self.dtype),
            "EXACT": self.dtype.itemsize > 2,
            "B": batch,
            "M": self.M,
            "HW": height * width,
            "H": height,
            "W": width,
            "P": settings.num_prefix_tokens,
            "P1": settings.num_prefix_tokens if settings.backend == "library" else 0,  # of z1
            "C": self.C,
            "E": self.E,
            "O": self.O,
            "KERNEL": self.kernel_size,
            "p_weight2": weight2,
            # Where no last program instance makes something of what all have left.
            "GROUP": 1,
            "EPS": 0.0,
            "momentum": 0.0,
        }

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer on the device of x, in ``acc_dtype`` unless told otherwise."""
        return buffer(shape, dtype or self.acc_dtype, self.x.device)

    def like(self, tensor: Tensor) -> Tensor:
        """A buffer of the shape and dtype of a tensor, contiguous."""
        return buffer(tensor.shape, tensor.dtype, tensor.device)

    def weight(self, i: int) -> Tensor:
        """The weight of a pointwise layer in the dtype of the GEMMs."""
        weight = self.layers[i].weight
        return weight if weight.dtype == self.dtype else compute(Tensor.to, weight, self.dtype)

    def prefix_tiles(self, rows: int) -> int:
        """Tiles of so many rows that the prefix tokens take."""
        return cdiv(self.x.shape[0] * self.settings.num_prefix_tokens, rows)

    def launch(self, kernel: Any, grid: tuple[int, ...], tiles: Tiles, **arguments: Any) -> None:
        """Launch a kernel, which also takes what it has a name for of ``known``."""
        launch(kernel, grid, {**self.known, **tiles.sizes, **arguments}, tiles.num_warps, tiles.num_stages)

    def tuned(self, kernel: Any, table: Tiles, shape: dict[str, Any], run: Callable[[Tiles], Result]) -> Result:
        """What ``run`` returns with ``tiles``, which time it too; it launches into buffers that it makes."""
        return run(self.tiles(kernel, table, shape, run))

    def tiles(self, kernel: Any, table: Tiles, shape: dict[str, Any], run: Callable[[Tiles], Any]) -> Tiles:
        """What ``tuned_tiles`` finds; processes that wait for one another keep to the table."""
        if self.settings.group is None:
            with without_plan():
                name = kernel.__name__.removesuffix("_kernel")
                table = tuned_tiles(name, table, {"tokens": self.M, **shape}, self.x, self.dtype, run)
        return table
