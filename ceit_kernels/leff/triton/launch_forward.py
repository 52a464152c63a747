"""LeFF's forward pass in training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...common.counters import counters
from ...common.launch import cdiv, one_publishes_for_all
from ...common.plan import compute, planned
from ...common.running import tell_counters
from ...common.sync_norm import gather_moments
from ...common.tuning import Tiles
from ..arguments import PARAMETER_NAMES, SHAPED, Settings
from ..norms import BatchNorm, buffers_for_one_launch, momenta_of, update_running_statistics
from . import NORM_ROWS
from .kernels_depthwise import leff_depthwise_kernel
from .kernels_gemm import leff_contract_operand_kernel, leff_expand_moments_kernel
from .kernels_norm import leff_norm_kernel
from .kernels_reduce import leff_statistics_kernel
from .kernels_stream import leff_moments_kernel
from .launch_common import SMS, Call, even_parts, groups_of, linear
from .tiles import PARTS, contract_tiles, depthwise_tiles, expand_tiles, moments_tiles, row_tiles

__all__ = ["contract_grid", "depthwise_grid", "depthwise_tickets", "leff_forward_triton"]

_NO_BUFFERS = (None,) * 9
_PROGRAMS = 4096  # enough one-warp program instances for the largest chip, few enough for their partial results


def leff_forward_triton(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    residual: Tensor | None,
    settings: Settings,
    out_dtype: torch.dtype | None,
    norms: Sequence[BatchNorm | None] | None = None,
) -> tuple[Tensor, ...]:
    """The results of ``ceit::leff``, by at most four passes over the tokens.

    Args:
        x, residual: tokens, B at least 1.
        parameters, settings: of the call.
        out_dtype: of the first result; None if that is not wanted, and has no element.
        norms: of the layers, whose running statistics an eager call averages; none are if None.
    """
    running, momenta = _NO_BUFFERS, ()
    if norms is not None and settings.group is None:
        found = buffers_for_one_launch(norms, x.device)
        running, momenta = (running, momenta) if found is None else (found, momenta_of(norms))
    results = _run(x, *parameters, residual, *running, settings, out_dtype, momenta, norms is not None)
    if momenta:
        tell_counters(running[2::3])
    elif norms is not None:
        tokens = x.shape[0] * settings.height * settings.width
        update_running_statistics(norms, results[4:7], results[7], tokens, "triton")
    return results


@planned(tensors=2 + len(PARAMETER_NAMES) + len(_NO_BUFFERS), shaped=SHAPED)
def _run(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *parameters, residual = rest[: len(PARAMETER_NAMES) + 1]
    *running, settings, out_dtype, momenta, eager = rest[len(PARAMETER_NAMES) + 1 :]
    call = Call(x, parameters, settings)
    norms = _Norms(call, running, momenta, eager)
    expand = _expand_by_library if settings.backend == "library" else _expand
    z1, norm1 = expand(call, norms)
    z2, norm2 = _depthwise(call, z1, norm1, norms)
    if settings.norms[2] == "none":
        z3 = call.empty(0, dtype=call.dtype)
        out, _ = _contract(call, z2, norm2, norms, residual, (*x.shape[:2], call.O), out_dtype)
    else:
        z3, norm3 = _contract(call, z2, norm2, norms, None, (call.M, call.O), call.dtype)
        out = _last_norm(call, z3, norm3, residual, out_dtype)
    arrays = (call.empty(0) if norm is None else norm for norm in norms.arrays)
    return out, z1, z2, z3, *arrays, norms.count


def _last_norm(
    call: Call, z3: Tensor, norm3: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    if out_dtype is None:
        return call.empty(0)
    tiles = row_tiles(call.O, 32)
    rows, out = tiles.sizes["TILE_M"], call.empty(*call.x.shape[:2], call.O, dtype=out_dtype)
    grid = cdiv(call.M, rows) + call.prefix_tiles(rows), cdiv(call.O, tiles.sizes["TILE_O"])
    call.launch(leff_norm_kernel, grid, tiles, p_z3=z3, p_norm3=norm3, p_x=call.x, p_residual=residual, p_out=out)
    return out


def _expand_by_library(call: Call, norms: _Norms) -> tuple[Tensor, Tensor | None]:
    """As ``_expand``, by PyTorch's GEMM: of all tokens, since leaving out the prefix would copy the others."""
    z1 = compute(_linear_of_rows, call.x, call.layers[0].weight, call.layers[0].bias, call.dtype)
    tiles = moments_tiles(call.E)
    columns = cdiv(call.E, tiles.sizes["TILE_E"])
    rows, parts = even_parts(call.M, max(1, 4 * SMS // columns), tiles.sizes["TILE_M"])
    moments = norms.moments(0, parts, call.E, columns)
    if moments:
        call.launch(leff_moments_kernel, (parts, columns), tiles, **moments, p_z=z1, ROWS=rows)
    return z1, norms.take(0, moments)


def _linear_of_rows(*arguments: Any) -> Tensor:
    return linear(*arguments).flatten(0, 1)


def _expand(call: Call, norms: _Norms) -> tuple[Tensor, Tensor | None]:
    arguments = {"p_x": call.x, "p_weight": call.weight(0), "p_bias": call.layers[0].bias}

    def run(tiles: Tiles, averages: bool = True) -> tuple[Tensor, dict[str, Any]]:
        rows, columns = cdiv(call.M, tiles.sizes["TILE_M"]), cdiv(call.E, tiles.sizes["TILE_E"])
        z1, moments = call.empty(call.M, call.E, dtype=call.dtype), norms.moments(0, rows, call.E, columns, averages)
        call.launch(leff_expand_moments_kernel, (rows * columns,), tiles, **arguments, **moments, p_z1=z1)
        return z1, moments

    table = expand_tiles(call.C, call.E, call.dtype, call.chip)
    shape = {"C": call.C, "E": call.E, "norm": call.settings.norms[0]}
    tiles = call.tiles(leff_expand_moments_kernel, table, shape, partial(run, averages=False))
    z1, moments = run(tiles)
    return z1, norms.take(0, moments)


def depthwise_grid(call: Call, tiles: Tiles) -> tuple[int, int, tuple[int]]:
    """Images that a program instance takes one after another, partial results that this leaves, and the grid."""
    columns = cdiv(call.settings.width, tiles.sizes["TILE_W"])
    channels = cdiv(call.E, tiles.sizes["TILE_E"])
    images = max(1, call.x.shape[0] * columns * channels // _PROGRAMS)
    parts = cdiv(call.x.shape[0], images) * columns
    return images, parts, (parts * channels,)


def depthwise_tickets(call: Call) -> int:
    """How many its program instances take tickets of where the last one goes on (``partials.sum_by_last``)."""
    tiles = depthwise_tiles(call.settings.width, call.E, call.kernel_size, call.dtype)
    _, parts, (programs,) = depthwise_grid(call, tiles)
    return programs // parts * (1 + groups_of(parts)[1])


def _depthwise(call: Call, z1: Tensor, norm1: Tensor | None, norms: _Norms) -> tuple[Tensor, Tensor | None]:
    tiles = depthwise_tiles(call.settings.width, call.E, call.kernel_size, call.dtype)
    images, parts, grid = depthwise_grid(call, tiles)
    z2, moments = call.empty(call.M, call.E, dtype=call.dtype), norms.moments(1, parts, call.E, grid[0] // parts)
    arguments = {"p_z1": z1, "p_norm1": norm1, "p_bias": call.layers[1].bias, "p_z2": z2, "IMAGES": images, "T": parts}
    arguments |= {"ACTIVATION": call.settings.activations[0], **moments}
    call.launch(leff_depthwise_kernel, grid, tiles, **arguments)
    return z2, norms.take(1, moments)


def _contract(
    call: Call,
    z2: Tensor,
    norm2: Tensor | None,
    norms: _Norms,
    residual: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """z3 (M, O) or, with prefix tokens before those of each image, the result (B, P + HW, O); and its norm array."""
    has_prefix, activation = len(shape) == 3, call.settings.activations[1]
    arguments = {"p_a": z2, "p_rows": norm2, "OPERAND": activation, "STRIDE_O": call.E, "STRIDE_E": 1}
    arguments |= {"p_weight": call.weight(2), "p_bias": call.layers[2].bias, "p_residual": residual}
    arguments |= {"p_prefix": call.x, "P": call.settings.num_prefix_tokens if has_prefix else 0}

    def run(tiles: Tiles, averages: bool = True) -> tuple[Tensor, dict[str, Any]]:
        out, rows = call.empty(*shape, dtype=dtype), cdiv(call.M, tiles.sizes["TILE_M"])
        grid = contract_grid(call, tiles, call.O, has_prefix)
        moments = norms.moments(2, rows, call.O, grid[0] // rows, averages)
        call.launch(leff_contract_operand_kernel, grid, tiles, **arguments, **moments, p_out=out)
        return out, moments

    table = contract_tiles(call.O, call.dtype, call.chip)
    key = {"E": call.E, "O": call.O, "operand": activation, "norm": call.settings.norms[2]}
    tiles = call.tiles(leff_contract_operand_kernel, table, key, partial(run, averages=False))
    out, moments = run(tiles)
    return out, norms.take(2, moments)


def contract_grid(call: Call, tiles: Tiles, channels: int, has_prefix: bool = True) -> tuple[int]:
    """The grid of ``leff_contract_operand_kernel`` for so many outputs."""
    rows = tiles.sizes["TILE_M"]
    tokens = cdiv(call.M, rows) + (call.prefix_tiles(rows) if has_prefix else 0)
    return (tokens * cdiv(channels, tiles.sizes["TILE_O"] * tiles.sizes["NUM_O"]),)


def _tickets(call: Call) -> int:
    """As ``depthwise_tickets``, of all kernels, with the fewest tokens a tile of a GEMM that are tried."""
    expand = expand_tiles(call.C, call.E, call.dtype, call.chip).sizes
    contract = contract_tiles(call.O, call.dtype, call.chip).sizes
    columns = max(cdiv(call.E, expand["TILE_E"]), cdiv(call.O, contract["TILE_O"] * contract["NUM_O"]))
    rows = max(16, min(expand["TILE_M"], contract["TILE_M"]) // 2)
    return max(depthwise_tickets(call), columns * (1 + groups_of(cdiv(call.M, rows))[1]))


class _Norms:
    """The norm arrays of a call's layers.

    Args:
        running: of each layer the running mean, running variance and counter that the call averages; none if empty.
        momenta: of each layer.
        eager: whether the call is.

    Attributes:
        arrays: what was taken so far.
        count: receives the tokens that batch statistics were taken of.
        tickets: of the layers' kernels, one after another, if their last program instances can go on to the arrays.
    """

    def __init__(self, call: Call, running: Sequence[Tensor | None], momenta: Sequence[float], eager: bool) -> None:
        self.call, self.running, self.momenta = call, running, momenta
        self.batch = [i for i, mode in enumerate(call.settings.norms) if mode == "batch"]
        self.arrays: list[Tensor | None] = [None] * 3
        self.count = call.empty(1 if self.batch else 0)
        self.tickets: Tensor | None = None
        if self.batch and call.settings.group is None and one_publishes_for_all():
            self.tickets = compute(counters, _tickets(call), call.x.device, eager)

    def moments(self, layer: int, parts: int, channels: int, columns: int, averages: bool = True) -> dict[str, Any]:
        """Where a kernel leaves partial moments of a layer's output, if its norm takes batch statistics; where there
        are tickets for so many columns of program instances, also what the last ones make of them; ``averages`` if
        running statistics are among it.
        """
        call = self.call
        if call.settings.norms[layer] != "batch":
            return {}
        group, groups = groups_of(parts)
        # Tuned tiles may be of a file that another table wrote.
        if self.tickets is None or columns * (1 + groups) > self.tickets.numel():
            return {"p_partial": call.empty(parts, 2, channels), "p_count": call.empty(parts)}
        known = {"p_partial": call.empty(parts + groups, 2, channels), "p_count": call.empty(columns, parts + groups)}
        return {**known, "p_tickets": self.tickets, "GROUP": group, **self._array(layer, channels, averages)}

    def _array(self, layer: int, channels: int, averages: bool = True) -> dict[str, Any]:
        """What a layer's array is made of, besides partial moments, and what is made with it."""
        call, settings = self.call, self.call.settings
        _, _, weight, bias, *_ = call.layers[layer]
        known = {"p_norm": call.empty(NORM_ROWS, channels), "p_norm_weight": weight, "p_norm_bias": bias}
        known["EPS"] = settings.eps[layer]
        # Later launches read it.
        if settings.group is not None or layer == self.batch[0]:
            known["p_total"] = self.count
        if self.momenta and averages:
            names = "p_running_mean", "p_running_var", "p_batches"
            known |= dict(zip(names, self.running[3 * layer : 3 * layer + 3], strict=True))
            known["momentum"] = self.momenta[layer]
        return known

    def take(self, layer: int, moments: dict[str, Any]) -> Tensor | None:
        """A layer's array, of ``moments`` if its norm takes batch statistics; those of layers before are taken."""
        call, settings = self.call, self.call.settings
        _, _, weight, bias, running_mean, running_var = call.layers[layer]
        if settings.norms[layer] == "none":
            return None
        if not moments:
            frozen = weight, bias, running_mean, running_var, settings.eps[layer], call.acc_dtype
            self.arrays[layer] = compute(_frozen_norm, *frozen)
        elif "p_norm" in moments:
            self.arrays[layer] = moments["p_norm"]
        elif settings.group is None:
            self.arrays[layer] = self._merge(layer, **moments)
        else:
            mine = self._merge(layer, **moments)
            self.arrays[layer] = self._merge(layer, *gather_moments(mine, self.count, settings.group))
        return self.arrays[layer]

    def _merge(self, layer: int, p_partial: Tensor, p_count: Tensor) -> Tensor:
        parts, _, channels = p_partial.shape
        known = {**self._array(layer, channels), "p_partial": p_partial, "p_count": p_count, "T": parts, "E": channels}
        self.call.launch(leff_statistics_kernel, (cdiv(channels, PARTS.sizes["TILE_E"]),), PARTS, **known)
        return known["p_norm"]


def _frozen_norm(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """The norm array of running statistics."""
    mean, variance = mean.to(dtype), variance.to(dtype)
    rstd = torch.rsqrt(variance + eps)
    scale = rstd if weight is None else rstd * weight.to(dtype)
    shift = torch.zeros_like(mean) if bias is None else bias.to(dtype)
    return torch.stack((mean, variance, rstd, scale, shift))
