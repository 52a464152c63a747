"""What a training call computes, and what its pipelines share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..common.launch import launch, target_chip
from ..common.tuning import tuned_blocks
from .arguments import parameters_per_layer

if TYPE_CHECKING:
    from .blocks import Blocks

__all__ = ["Forward", "Layer", "Needs", "Problem"]


class Layer(NamedTuple):
    """A convolution and its norm, the tensors in the order of the registered operators."""

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


class Needs(NamedTuple):
    """Which gradients of a layer are wanted: of the convolution's weight and bias, of the norm's weight and bias."""

    weight: bool
    bias: bool
    norm_weight: bool
    norm_bias: bool

    @property
    def sums(self) -> bool:
        """Whether the sums over tokens are wanted for themselves."""
        return self.bias or self.norm_weight or self.norm_bias


@dataclass(frozen=True)
class Problem:
    """What a call computes.

    Attributes:
        x: tokens (B, P + H * W, C).
        parameters: ``parameters_per_layer`` tensors for each of the three layers.
        norms: of each layer "none", "frozen" (running statistics) or "batch" (this batch's).
        eps: of each norm.
        grid_size: (H, W).
        num_prefix_tokens: P.
        activations: after the first and the second layer.
        dtype: what products take.
        group: the process group whose batches are one for the statistics, or None.
    """

    x: Tensor
    parameters: Sequence[Tensor | None]
    norms: Sequence[str]
    eps: Sequence[float]
    grid_size: tuple[int, int]
    num_prefix_tokens: int
    activations: tuple[str, str]
    dtype: torch.dtype
    group: Any = None
    layers: tuple[Layer, ...] = field(init=False)

    def __post_init__(self) -> None:
        starts = range(0, 3 * parameters_per_layer, parameters_per_layer)
        layers = (Layer(*self.parameters[i : i + parameters_per_layer]) for i in starts)
        object.__setattr__(self, "layers", tuple(layers))

    @property
    def tokens(self) -> int:
        """Image tokens of the batch, M."""
        return self.x.shape[0] * self.grid_size[0] * self.grid_size[1]

    @property
    def hidden_features(self) -> int:
        """E."""
        return self.layers[0].weight.shape[0]

    @property
    def out_features(self) -> int:
        """O."""
        return self.layers[2].weight.shape[0]

    @property
    def kernel_size(self) -> int:
        """Side of the depthwise kernels."""
        return self.layers[1].weight.shape[-1]

    @property
    def wide(self) -> torch.dtype:
        """What sums and statistics are kept in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def chip(self) -> int:
        """What the launches are for, as ``target_chip`` has it."""
        return target_chip(self.x)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer on the device of x, in ``wide`` unless told otherwise."""
        return torch.empty(shape, dtype=dtype or self.wide, device=self.x.device)

    def weight(self, i: int) -> Tensor:
        """The weight matrix of a pointwise layer as products take it."""
        return self.layers[i].weight.flatten(1).to(self.dtype).contiguous()

    def bias(self, i: int) -> Tensor | None:
        """The bias of a pointwise layer in the dtype of products."""
        bias = self.layers[i].bias
        return None if bias is None else bias.to(self.dtype)

    def taps(self) -> Tensor:
        """The depthwise kernels as (k * k, E), so that neighbouring channels are neighbours in memory."""
        return self.layers[1].weight.flatten(1).t().to(self.wide).contiguous()

    def launch(self, kernel: Any, grid: tuple[int, ...], blocks: Blocks, arguments: dict[str, Any]) -> None:
        """Launch a kernel with the constants and sizes that it takes."""
        from ..common.precision import precision_arguments

        height, width = self.grid_size
        known = {
            **precision_arguments(self.dtype),
            "EXACT": self.dtype.itemsize > 2,
            "B": self.x.shape[0],
            "M": self.tokens,
            "HW": height * width,
            "H": height,
            "W": width,
            "P": self.num_prefix_tokens,
            "C": self.x.shape[2],
            "E": self.hidden_features,
            "O": self.out_features,
            "KERNEL": self.kernel_size,
            **blocks.sizes,
        }
        taken = {name: value for name, value in known.items() if name in kernel.arg_names}
        launch(kernel, grid, {**taken, **arguments}, num_warps=blocks.num_warps, num_stages=blocks.num_stages)

    def tuned(self, kernel: str, table: Blocks, shape: dict[str, Any], run: Callable[[Blocks], Any]) -> Blocks:
        """The blocks of a launch, as ``tuned_blocks`` has it. Processes that wait for one another keep to the table."""
        if self.group is not None:
            return table
        return tuned_blocks(kernel, table, {"tokens": self.tokens, **shape}, self.x, self.dtype, run)

    def prefix_blocks(self, block: int) -> int:
        """Program instances that copy prefix tokens."""
        return -(-self.x.shape[0] * self.num_prefix_tokens // block)


class Forward(NamedTuple):
    """The result and what backward needs of it; a norm that is not there, and its input, have no element."""

    out: Tensor  # (B, P + HW, O)
    z1: Tensor  # (M, E)
    z2: Tensor  # (M, E)
    z3: Tensor  # (M, O)
    norm1: Tensor  # (5, E)
    norm2: Tensor  # (5, E)
    norm3: Tensor  # (5, O)
    count: Tensor  # (1,), tokens of which the statistics of the batch were taken
