"""Host side of the Triton kernels: tiles, grids, buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...common.launch import launch
from ...common.philox import dropout_threshold
from ...common.precision import precision_arguments
from .kernels import (
    lca_backward_input_kernel,
    lca_backward_scores_kernel,
    lca_backward_weight_kernel,
    lca_forward_kernel,
)

__all__ = ["lca_backward_triton", "lca_forward_triton"]

_IMAGES = 16  # the smallest side of a tensor-core matmul: more images a tile would leave SMs idle


@dataclass(frozen=True)
class _Problem:
    """One call's sizes, and the kernel arguments that all of its launches share."""

    x: Tensor  # (B, L, C)
    num_heads: int
    dtype: torch.dtype

    @property
    def head_dim(self) -> int:
        return self.x.shape[2] // self.num_heads

    def arguments(self) -> dict[str, Any]:
        batch, layers, channels = self.x.shape
        return {
            "B": batch,
            "L": layers,
            "C": channels,
            "D": self.head_dim,
            "TILE_B": _IMAGES,
            "TILE_L": self.tile_of_layers,
            "TILE_C": self.tile_of_channels,
            "TILE_D": max(16, triton.next_power_of_2(self.head_dim)),
            **precision_arguments(self.dtype),
        }

    @property
    def tile_of_layers(self) -> int:
        return min(16, triton.next_power_of_2(self.x.shape[1]))

    @property
    def padded_layers(self) -> int:
        return triton.next_power_of_2(triton.cdiv(self.x.shape[1], self.tile_of_layers)) * self.tile_of_layers

    @property
    def is_wide(self) -> bool:
        """Whether a head's rows are so wide that a full tile of channels of them would not fit the registers."""
        return triton.next_power_of_2(self.head_dim) * self.dtype.itemsize >= 512

    @property
    def tile_of_channels(self) -> int:
        return 16 if self.is_wide or self.dtype == torch.float64 else 32

    @property
    def images(self) -> int:
        return triton.cdiv(self.x.shape[0], _IMAGES)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": 8, "num_stages": 1 if self.is_wide and self.dtype.itemsize > 2 else 2}


def _dropout_arguments(dropout_p: float, seed: Tensor | None) -> dict[str, Any]:
    return {
        "p_seed": seed,
        "drop_below": dropout_threshold(dropout_p),
        "KEEP_SCALE": 1.0 / (1.0 - dropout_p),
        "HAS_DROPOUT": dropout_p > 0.0,
    }


def lca_forward_triton(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    scale: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> Tensor:
    """One launch. Arguments as of ``lca_attention``, contiguous, B at least 1; ``dtype`` is what matmuls take."""
    problem = _Problem(x, num_heads, dtype)
    out = torch.empty(x.shape[0], 1, x.shape[2], dtype=dtype, device=x.device)
    launch(
        lca_forward_kernel,
        (problem.images, num_heads),
        {
            **problem.arguments(),
            **_dropout_arguments(dropout_p, seed),
            "p_x": x,
            "p_weight": qkv_weight,
            "p_bias": qkv_bias,
            "p_out": out,
            "SCALE": scale,
            "HAS_BIAS": qkv_bias is not None,
            "LP": problem.padded_layers,
        },
        **problem.options,
    )
    return out


def lca_backward_triton(
    grad_out: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    scale: float,
    dropout_p: float,
    dtype: torch.dtype,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """At most three launches; the gradients of x, qkv_weight and qkv_bias that are needed, None for the others."""
    problem = _Problem(x, num_heads, dtype)
    batch, layers, channels = x.shape
    q, dq = (torch.empty(batch, channels, dtype=dtype, device=x.device) for _ in range(2))
    # Scratch of this call alone, 12 bytes where a token has 2C: the other two kernels need it for every channel.
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    p, ds = (torch.empty(batch, num_heads, layers, dtype=sums, device=x.device) for _ in range(2))
    shared = {**problem.arguments(), "p_grad": grad_out}
    scratch = {"p_q": q, "p_dq": dq, "p_p": p, "p_ds": ds}

    launch(
        lca_backward_scores_kernel,
        (problem.images, num_heads),
        {
            **shared,
            **scratch,
            **_dropout_arguments(dropout_p, seed),
            "p_x": x,
            "p_weight": qkv_weight,
            "p_bias": qkv_bias,
            "SCALE": scale,
            "HAS_BIAS": qkv_bias is not None,
            "LP": problem.padded_layers,
        },
        **problem.options,
    )

    grad_x = grad_weight = grad_bias = None
    tiles_of_channels = triton.cdiv(channels, problem.tile_of_channels)
    if need_input:
        grad_x = torch.empty_like(x)
        launch(
            lca_backward_input_kernel,
            (problem.images, tiles_of_channels, triton.cdiv(layers, problem.tile_of_layers)),
            {**shared, **scratch, "p_weight": qkv_weight, "p_dx": grad_x, "H": num_heads},
            **problem.options,
        )
    if need_weight:
        grad_weight = torch.empty_like(qkv_weight)
        grad_bias = None if qkv_bias is None else torch.empty_like(qkv_bias)
        launch(
            lca_backward_weight_kernel,
            (num_heads, tiles_of_channels),
            {
                **shared,
                **scratch,
                "p_x": x,
                "p_dweight": grad_weight,
                "p_dbias": grad_bias,
                "HAS_BIAS": qkv_bias is not None,
                "LP": problem.padded_layers,
            },
            **problem.options,
        )
    return grad_x, grad_weight, grad_bias
