"""Host side of the Triton kernels: tiles, grids, buffers."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ...common.launch import cdiv, launch, one_publishes_for_all
from ...common.plan import buffer, buffers_like, planned
from . import TICKETS
from .kernels import add_norm_backward_kernel, add_norm_forward_kernel

__all__ = ["add_norm_backward_triton", "add_norm_forward_triton"]

_TILE = 2048  # elements that a program instance of 4 warps holds of each tensor: 16 a thread, in float64 8
_PARTS = 528  # partial sums of the parameters' gradients: 4 program instances for each SM of an H100
_GROUP = cdiv(_PARTS, TICKETS - 8)  # of which the sums are summed again, of about as many


def statistics_dtype(x: Tensor) -> torch.dtype:
    """What statistics are kept in and sums are taken in."""
    return torch.promote_types(x.dtype, torch.float32)


def _tiles(x: Tensor) -> tuple[dict[str, Any], int]:
    """The constants of a kernel over rows like those of ``x``, and its warps."""
    channels = x.shape[-1]
    padded = next_power_of_2(channels)
    double = statistics_dtype(x) == torch.float64
    rows = max(1, _TILE // (2 * padded if double else padded))
    acc = tl.float64 if double else tl.float32
    return {"C": channels, "TILE_R": rows, "TILE_C": padded, "ACC": acc}, 4 if padded <= _TILE else 8


def _token_arguments(x: Tensor, num_prefix_tokens: int) -> dict[str, Any]:
    rows, tokens = x.numel() // x.shape[-1], x.shape[-2] if num_prefix_tokens else 1
    return {"M": rows, "N": tokens, "P": abs(num_prefix_tokens), "LAST": num_prefix_tokens < 0}


@planned(tensors=4)
def add_norm_forward_triton(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    num_prefix_tokens: int,
    need_statistics: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """The results of ``ceit::add_norm`` in one launch, its arguments checked and not empty."""
    total = None
    if branch is not None:
        total = buffer(x.shape, torch.promote_types(x.dtype, branch.dtype), x.device)
    out = buffer(x.shape, out_dtype, x.device)
    source = x if total is None else total
    prefix = None
    if num_prefix_tokens:
        shape = (x.shape[0], abs(num_prefix_tokens), x.shape[2])
        prefix = buffer(shape, source.dtype, x.device)
    mean, rstd = (buffer(x.shape[:-1], statistics_dtype(source), x.device) for _ in range(2))
    tickets = buffer((TICKETS,), torch.int32, x.device) if need_statistics else None
    constants, num_warps = _tiles(source)
    rows = _token_arguments(x, num_prefix_tokens)
    known = {"p_x": x, "p_branch": branch, "p_weight": weight, "p_bias": bias, "p_total": total, "p_out": out}
    known |= {"p_prefix": prefix, "p_mean": mean, "p_rstd": rstd, "p_tickets": tickets}
    known |= {"EPS": eps, "TICKETS": TICKETS, **rows, **constants}
    launch(add_norm_forward_kernel, (cdiv(rows["M"], constants["TILE_R"]),), known, num_warps)
    return total, out, prefix, *((mean, rstd, tickets) if need_statistics else (None,) * 3)


def add_norm_backward_triton(
    grad_out: Tensor, grad_total: Tensor | None, grad_prefix: Tensor | None, *others: Any, last: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One launch; the gradients of the sum, the weight and the bias, None for those that are not needed.

    Args:
        grad_out, grad_total, grad_prefix: gradients of the results.
        others: total, weight, bias, mean, rstd, tickets, need_input, need_weight and need_bias.
        last: whether the prefix is that of the last tokens.
    """
    prefix, tokens, stride = _in_one_piece(grad_prefix)
    return _backward(grad_out, grad_total, prefix, *others, -tokens if last else tokens, stride)


def _in_one_piece(prefix: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A prefix (B, P, C) from its first number to its last, P, and how far its images are apart.

    Its gradient mostly is a part of that of all layers' class tokens, which is read where it lies.
    """
    if prefix is None:
        return None, 0, 0
    batch, tokens, channels = prefix.shape
    stride = prefix.stride(0)
    if prefix[0].is_contiguous() and stride >= tokens * channels:
        return prefix.as_strided(((batch - 1) * stride + tokens * channels,), (1,)), tokens, stride
    return prefix.contiguous(), tokens, tokens * channels


@planned(tensors=9)
def _backward(
    grad_out: Tensor,
    grad_total: Tensor | None,
    grad_prefix: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    tickets: Tensor,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    num_prefix_tokens: int,
    stride: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    constants, num_warps = _tiles(total)
    if not one_publishes_for_all():
        num_warps = 1
    rows = _token_arguments(total, num_prefix_tokens)
    per_part = cdiv(cdiv(rows["M"], constants["TILE_R"]), _PARTS) * constants["TILE_R"]
    parts = cdiv(rows["M"], per_part)
    grad = buffer(total.shape, total.dtype, total.device) if need_input else None
    grad_weight, grad_bias = buffers_like((weight, bias), (need_weight, need_bias))
    partial = None
    if need_weight or need_bias:
        partial = buffer((parts + cdiv(parts, _GROUP), 2, total.shape[-1]), mean.dtype, total.device)
    known = {"p_dout": grad_out, "p_dtotal": grad_total, "p_dprefix": grad_prefix, "p_total": total, "p_mean": mean}
    known |= {"p_weight": weight, "p_rstd": rstd, "p_dx": grad, "p_partial": partial, "p_tickets": tickets}
    known |= {"p_dweight": grad_weight, "p_dbias": grad_bias, "ROWS": per_part, "STRIDE": stride, "T": parts}
    known |= {"GROUP": _GROUP, "TILE_T": min(32, 2 * constants["TILE_R"]), **rows, **constants}
    # With more an SM would not hold 4 of them. Wider types spill, and so do the shortest rows.
    short = max(total.dtype.itemsize, grad_out.dtype.itemsize) <= 2
    registers = 128 if short and 256 <= constants["TILE_C"] <= _TILE else 255
    launch(add_norm_backward_kernel, (parts,), known, num_warps, registers=registers)
    return grad, grad_weight, grad_bias
