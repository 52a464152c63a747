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
_PARTS = 352  # partial sums of each third of the bias: with all three 8 program instances for each SM of an H100
_TICKETS = 32  # counters of each third
_GROUP = cdiv(_PARTS, _TICKETS - 8)  # partial sums whose sums are summed again, of about as many


@planned(tensors=3)
def qkv_gradient_triton(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, need_qkv: bool, bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """One launch; see ``ceit::qkv_gradient``, the arguments not empty."""
    batch, tokens, *heads = grad_k.shape
    channels, rows, device = heads[0] * heads[1], batch * tokens, grad_k.device
    dtype = torch.promote_types(grad_k.dtype, torch.float32)
    half = min(channels, 8 * cdiv(channels, 16))  # the second one starts where 16 bytes do
    padded = next_power_of_2(half)
    tile = max(1, _TILE // (2 * padded * (2 if dtype == torch.float64 else 1)))
    per_part = tile * cdiv(cdiv(rows, tile), _PARTS)
    parts = cdiv(rows, per_part)
    grad = buffer((batch, tokens, 3 * channels), grad_k.dtype, device) if need_qkv else None
    bias = partial = tickets = None
    if bias_dtype is not None:
        bias = buffer((3 * channels,), bias_dtype, device)
        partial = buffer((3, parts + cdiv(parts, _GROUP), 2, half), dtype, device)
        tickets = compute(counters, 3 * _TICKETS, device)
    known: dict[str, Any] = {"p_dq": grad_q, "p_dk": grad_k, "p_dv": grad_v, "p_dqkv": grad, "p_dbias": bias}
    known |= {"p_partial": partial, "p_tickets": tickets, "M": rows, "N": tokens, "QUERIES": grad_q.shape[1]}
    known |= {"ROWS": per_part, "T": parts, "GROUP": _GROUP, "C": channels, "E": half, "TICKETS": _TICKETS}
    known |= {"TILE_T": min(32, 2 * tile), "TILE_R": tile, "TILE_E": padded}
    known["ACC"] = tl.float64 if dtype == torch.float64 else tl.float32
    num_warps = (4 if 2 * padded <= _TILE else 8) if one_publishes_for_all() else 1
    launch(qkv_gradient_kernel, (parts, 3), known, num_warps)
    return grad, bias
