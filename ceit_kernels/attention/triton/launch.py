"""Host side of the Triton kernel: tiles, grid, buffers."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ...common.counters import counters
from ...common.launch import cdiv, launch, one_publishes_for_all
from ...common.plan import buffer, compute, planned
from .kernels import qkv_gradient_kernel

__all__ = ["qkv_gradient_triton"]

_TILE = 2048  # elements that a program instance of 4 warps holds: 16 a thread, in float64 8
_INSTANCES = 1056  # program instances: 8 for each SM of an H100
_TICKETS = 32  # counters of each sum
_GROUP = cdiv(_INSTANCES // 3, _TICKETS - 8)  # partial sums whose sums are summed again, of about as many


@planned(tensors=4)
def qkv_gradient_triton(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_out: Tensor | None,
    need_qkv: bool,
    bias_dtype: torch.dtype | None,
    out_bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One launch; see ``ceit::qkv_gradient``, the arguments not empty."""
    batch, tokens, *heads = grad_k.shape
    channels, rows, device = heads[0] * heads[1], batch * tokens, grad_k.device
    dtype = torch.promote_types(grad_k.dtype, torch.float32)
    half = min(channels, 8 * cdiv(channels, 16))  # the second one starts where 16 bytes do
    padded = next_power_of_2(half)
    tile = max(1, _TILE // (2 * padded * (2 if dtype == torch.float64 else 1)))
    thirds = 3 if grad_out is None else 4
    per_part = tile * cdiv(cdiv(rows, tile), _INSTANCES // thirds)
    parts = cdiv(rows, per_part)
    grad = buffer((batch, tokens, 3 * channels), grad_k.dtype, device) if need_qkv else None
    bias = None if bias_dtype is None else buffer((3 * channels,), bias_dtype, device)
    out_bias = None if out_bias_dtype is None else buffer((channels,), out_bias_dtype, device)
    partial = tickets = None
    if bias is not None or out_bias is not None:
        partial = buffer((thirds, parts + cdiv(parts, _GROUP), 2, half), dtype, device)
        tickets = compute(counters, thirds * _TICKETS, device)
    known: dict[str, Any] = {"p_dq": grad_q, "p_dk": grad_k, "p_dv": grad_v, "p_dout": grad_out, "p_dqkv": grad}
    known |= {"p_dbias": bias, "p_dout_bias": out_bias, "p_partial": partial, "p_tickets": tickets}
    known |= {"M": rows, "N": tokens, "QUERIES": grad_q.shape[1]}
    known |= {"ROWS": per_part, "T": parts, "GROUP": _GROUP, "C": channels, "E": half, "TICKETS": _TICKETS}
    known |= {"TILE_T": min(32, 2 * tile), "TILE_R": tile, "TILE_E": padded}
    known["ACC"] = tl.float64 if dtype == torch.float64 else tl.float32
    num_warps = (4 if 2 * padded <= _TILE else 8) if one_publishes_for_all() else 1
    launch(qkv_gradient_kernel, (parts, thirds), known, num_warps)
    return grad, bias, out_bias
