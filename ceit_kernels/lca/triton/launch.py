"""Host side of the Triton kernels: tiles, grids, buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import next_power_of_2

from ...common.launch import cdiv, launch
from ...common.philox import dropout_threshold
from ...common.plan import buffer, buffers_like, planned
from ...common.precision import precision_arguments
from ...common.tuning import Tiles
from .kernels import (
    lca_backward_input_kernel,
    lca_backward_scores_kernel,
    lca_backward_weight_kernel,
    lca_forward_kernel,
)


def _tiles(layers: int, head_dim: int, dtype: torch.dtype) -> Tiles:
    """Images, layers, channels, and channels of a head, and all layers in whole tiles."""
    rows = min(16, next_power_of_2(layers))
    # A head's rows may be so wide that a full tile of channels of them would not fit the registers.
    is_wide = next_power_of_2(head_dim) * dtype.itemsize >= 512
    sizes = {
        "TILE_B": 16,  # the smallest side of a tensor-core matmul: more images a tile would leave SMs idle
        "TILE_L": rows,
        "LP": next_power_of_2(cdiv(layers, rows)) * rows,
        "TILE_C": 16 if is_wide or dtype == torch.float64 else 32,
        "TILE_D": max(16, next_power_of_2(head_dim)),
    }
    return Tiles(sizes, num_warps=8, num_stages=1 if is_wide and dtype.itemsize > 2 else 2)


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, num_heads: int, scale: float, dropout_p: float
) -> dict[str, Any]:
    batch, layers, channels = x.shape
    return {
        "p_x": x,
        "p_weight": weight,
        "p_bias": bias,
        "p_seed": seed,
        "B": batch,
        "L": layers,
        "C": channels,
        "D": channels // num_heads,
        "H": num_heads,
        "SCALE": scale,
        "HAS_BIAS": bias is not None,
        "drop_below": dropout_threshold(dropout_p),
        "KEEP_SCALE": 1.0 / (1.0 - dropout_p),
        "HAS_DROPOUT": dropout_p > 0.0,
    }


@planned(tensors=4)
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
    """One launch. Arguments as of ``lca_attention``, B at least 1; ``dtype`` is what matmuls take."""
    out = buffer((x.shape[0], 1, x.shape[2]), dtype, x.device)
    tiles = _tiles(x.shape[1], x.shape[2] // num_heads, dtype)
    known = _arguments(x, qkv_weight, qkv_bias, seed, num_heads, scale, dropout_p)
    known |= {**tiles.sizes, **precision_arguments(dtype), "p_out": out}
    grid = (cdiv(x.shape[0], tiles.sizes["TILE_B"]), num_heads)
    launch(lca_forward_kernel, grid, known, tiles.num_warps, tiles.num_stages)
    return out


@planned(tensors=5)
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
    batch, layers, channels = x.shape
    tiles = _tiles(layers, channels // num_heads, dtype)
    q, dq = (buffer((batch, channels), dtype, x.device) for _ in range(2))
    # Scratch of this call alone, 12 bytes where a token has 2C: the other two kernels need it for every channel.
    acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    p, ds = (buffer((batch, num_heads, layers), acc_dtype, x.device) for _ in range(2))
    needs = need_input, need_weight, need_weight
    grad_x, grad_weight, grad_bias = buffers_like((x, qkv_weight, qkv_bias), needs)
    known = _arguments(x, qkv_weight, qkv_bias, seed, num_heads, scale, dropout_p)
    known |= {**tiles.sizes, **precision_arguments(dtype), "p_grad": grad_out, "p_q": q, "p_dq": dq, "p_p": p}
    known |= {"p_ds": ds, "p_dx": grad_x, "p_dweight": grad_weight, "p_dbias": grad_bias}
    options = tiles.num_warps, tiles.num_stages
    images, rows, columns = (cdiv(n, tiles.sizes[f"TILE_{axis}"]) for n, axis in zip(x.shape, "BLC", strict=True))
    launch(lca_backward_scores_kernel, (images, num_heads), known, *options)
    if need_input:
        launch(lca_backward_input_kernel, (images, columns, rows), known, *options)
    if need_weight:
        launch(lca_backward_weight_kernel, (num_heads, columns), known, *options)
    return grad_x, grad_weight, grad_bias
