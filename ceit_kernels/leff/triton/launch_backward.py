"""LeFF's backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.launch import cdiv
from ...common.plan import buffers_like, planned
from ...common.precision import short_precision
from ...common.sync_norm import sum_over_processes
from ...common.tuning import Tiles
from ..arguments import PARAMETER_NAMES, SAVED_NAMES, Settings
from . import GRADIENT_ROWS
from .kernels_depthwise import leff_depthwise_backward_kernel
from .kernels_factored import leff_factored_weight_kernel, leff_fold_gradient_kernel
from .kernels_gemm import leff_contract_operand_kernel, leff_hidden_gradient_kernel, leff_weight_gradient_kernel
from .kernels_norm import leff_norm_gradient_kernel, leff_norm_sums_kernel
from .kernels_reduce import leff_coefficients_kernel, leff_sums_kernel
from .launch_common import Call, hashable
from .launch_forward import contract_grid, depthwise_grid
from .tiles import (
    PARTS,
    SUMS,
    contract_tiles,
    depthwise_tiles,
    factored_weight_tiles,
    fold_gradient_tiles,
    hidden_gradient_tiles,
    row_tiles,
    weight_gradient_tiles,
)

__all__ = ["leff_backward_triton"]

_ROWS = 512  # tokens of which a program instance of the norm's sums takes the sum


def leff_backward_triton(
    dout: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    settings: Settings,
    need_x: bool,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """At most eight launches that go over the tokens, fewer where not every gradient is wanted.

    Args:
        dout: gradient of the result.
        x, parameters, settings: of the forward pass.
        saved: what it returned behind its result.
        need_x: whether the gradient of x is wanted.
        needs: whether those of weight, bias, norm weight and norm bias of each layer are.

    Returns:
        These gradients, None where not wanted.
    """
    return _run(x, *parameters, dout, *saved, hashable(settings), need_x, tuple(needs))


@planned(tensors=2 + len(PARAMETER_NAMES) + len(SAVED_NAMES))
def _run(x: Tensor, *rest: Any) -> list[Tensor | None]:
    *tensors, settings, need_x, needs = rest
    parameters, (dout, *saved) = tensors[: len(PARAMETER_NAMES)], tensors[len(PARAMETER_NAMES) :]
    backward = _Backward(Call(x, parameters, settings), saved, dout, need_x, needs)
    dx = backward.run()
    backward.take_sums()
    return [dx, *(gradient for layer in backward.gradients for gradient in layer)]


def _is_factored(dtype: torch.dtype) -> bool:
    """Whether the first layer's gradients are computed as ``kernels_factored`` has it."""
    return dtype.itemsize <= 2


class _Backward:
    def __init__(self, call: Call, saved: Sequence[Tensor], dout: Tensor, need_x: bool, needs: Sequence[bool]) -> None:
        self.call, self.dout, self.need_x = call, dout, need_x
        self.z1, self.z2, self.z3, *norms, self.count = saved
        self.norms = [norm if norm.numel() else None for norm in norms]
        self.needs = [needs[i : i + 4] for i in (0, 4, 8)]
        self.gradients: list[list[Tensor | None]] = [[None] * 4 for _ in self.needs]
        # Partial results, of the taps and of others, that wait for one launch to sum them, and where the sums go.
        self.taps: tuple[Tensor, Tensor] | None = None
        self.partials: list[tuple[Tensor, Tensor]] = []
        call.known |= {"p_dout": dout, "p_z1": self.z1, "p_z2": self.z2, "p_z3": self.z3}
        call.known |= {f"p_norm{i}": norm for i, norm in enumerate(self.norms, 1)}

    def run(self) -> Tensor | None:
        """The gradient of x if that is wanted; fills ``gradients``, from the last layer down."""
        need_weight1, need_weight2, need_weight3 = (need[0] for need in self.needs)
        below1 = self.need_x or need_weight1
        below2 = self.need_x or any(self.needs[0]) or need_weight2
        below3 = below2 or any(self.needs[1])
        gradient3 = self._norm3_gradient(below3 or need_weight3)
        if not (below3 or need_weight3):
            return None
        dz3, prefix = self._dz3(gradient3)
        if need_weight3:
            self.gradients[2][0] = self._weight3(dz3, prefix)
        if not below3:
            return None
        g2, gradient2 = self._g2(dz3, prefix, below2)
        if not below2:
            return None
        g1, gradient1 = self._g1(g2, gradient2, below1)
        if not below1:
            return None
        factored = _is_factored(self.call.dtype)
        return self._layer1_factored(g1, gradient1) if factored else self._layer1(g1, gradient1, g2)

    def _coefficients(self, layer: int, partial: Tensor, wanted: bool) -> Tensor | None:
        """The gradients of the layer's vectors, and its gradient array if that is wanted."""
        call, needs = self.call, self.needs[layer][1:]
        if not (wanted or any(needs)):
            return None
        vectors = buffers_like(call.layers[layer][1:4], needs)
        self.gradients[layer][1:] = vectors
        channels, group = partial.shape[-1], call.settings.group
        batch = call.settings.norms[layer] == "batch"
        sums, gradient = call.empty(1, 2, channels), call.empty(GRADIENT_ROWS, channels)

        arguments = {"p_norm": self.norms[layer], "p_total": self.count if batch else None, "E": channels}
        arguments |= {"p_sums": sums, "p_gradient": gradient}
        grid = (cdiv(channels, PARTS.sizes["TILE_E"]),)

        def reduce(partial: Tensor, **vectors: Tensor | None) -> None:
            given = {**arguments, "p_partial": partial, "T": partial.shape[0], **vectors}
            call.launch(leff_coefficients_kernel, grid, PARTS, **given)

        reduce(partial, **dict(zip(("p_dbias", "p_dnorm_weight", "p_dnorm_bias"), vectors, strict=True)))
        if group is not None and batch and wanted:
            reduce(sum_over_processes(sums, group))
        return gradient

    def _norm3_gradient(self, wanted: bool) -> Tensor | None:
        call, norm3 = self.call, self.norms[2]
        if not (any(self.needs[2][1:]) or (wanted and norm3 is not None)):
            return None
        tiles, parts = row_tiles(call.O), cdiv(call.M, _ROWS)
        partial, grid = call.empty(parts, 2, call.O), (parts, cdiv(call.O, tiles.sizes["TILE_O"]))
        call.launch(leff_norm_sums_kernel, grid, tiles, p_partial=partial, ROWS=_ROWS)
        return self._coefficients(2, partial, wanted)

    def _dz3(self, gradient3: Tensor | None) -> tuple[Tensor, int]:
        """The gradient of z3, and the prefix tokens that it has before each image's."""
        call = self.call
        if self.norms[2] is None:
            return self.dout, call.settings.num_prefix_tokens
        tiles, dz3 = row_tiles(call.O), call.like(self.z3)
        grid = (cdiv(call.M, tiles.sizes["TILE_M"]), cdiv(call.O, tiles.sizes["TILE_O"]))
        call.launch(leff_norm_gradient_kernel, grid, tiles, p_gradient3=gradient3, p_dz3=dz3)
        return dz3, 0

    def _g2(self, dz3: Tensor, prefix: int, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """The gradient of the second norm's output, and the norm's gradient array if that is wanted."""
        call = self.call
        arguments = {"p_dz3": dz3, "p_weight": call.weight(2), "P": prefix, "ACTIVATION": call.settings.activations[1]}

        def run(tiles: Tiles) -> tuple[Tensor, Tensor]:
            rows = cdiv(call.M, tiles.sizes["TILE_M"])
            g2, partial = call.like(self.z2), call.empty(rows, 2, call.E)
            grid = (rows * cdiv(call.E, tiles.sizes["TILE_E"]),)
            call.launch(leff_hidden_gradient_kernel, grid, tiles, **arguments, p_g2=g2, p_partial=partial)
            return g2, partial

        table = hidden_gradient_tiles(call.O, call.E, call.dtype, call.chip)
        g2, partial = call.tuned("leff_hidden_gradient", table, {"E": call.E, "O": call.O}, run)
        return g2, self._coefficients(1, partial, wanted)

    def _g1(self, g2: Tensor, gradient2: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """The gradient of the first norm's output, and the norm's gradient array if that is wanted."""
        call = self.call
        tiles = depthwise_tiles(call.settings.width, call.E, call.kernel_size, call.dtype)
        images, parts, grid = depthwise_grid(call, tiles)
        g1, partial = call.like(g2), call.empty(parts, 2, call.E)
        taps_gradient = call.empty(parts, call.kernel_size**2, call.E)
        arguments = {"p_g2": g2, "p_gradient2": gradient2, "ACTIVATION": call.settings.activations[0]}
        arguments |= {"p_g1": g1, "p_taps_gradient": taps_gradient, "p_partial": partial, "IMAGES": images}
        call.launch(leff_depthwise_backward_kernel, grid, tiles, **arguments)
        if self.needs[1][0]:
            gradient = self.gradients[1][0] = call.like(call.layers[1].weight)
            self.taps = taps_gradient, gradient
        return g1, self._coefficients(0, partial, wanted)

    def _layer1(self, g1: Tensor, gradient1: Tensor, scratch: Tensor) -> Tensor | None:
        """The gradients of x and of the first weight from the gradient of the first norm's output."""
        need_weight, weight = self.needs[0][0], self.call.layers[0].weight
        operand = {"p_a": g1, "p_z": self.z1, "p_rows": gradient1, "OPERAND": "gradient"}
        dx = None
        if self.need_x:
            dx = self._dx(self.call.weight(0), **operand, p_operand=scratch if need_weight else None)
            operand = {"p_a": scratch, "OPERAND": "plain"}  # the gradient of z1
        if need_weight:
            partial, _ = self._weight_partial(self.call.E, self.call.C, p_tokens=self.call.x, **operand)
            self.gradients[0][0] = self._sum(partial, *weight.shape, dtype=weight.dtype)
        return dx

    def _layer1_factored(self, g1: Tensor, gradient1: Tensor) -> Tensor | None:
        """The same, as ``kernels_factored`` has it."""
        call, channels, weight = self.call, self.call.C, self.call.weight(0)
        tail = bias = mean = gram = sums = total = None
        if call.settings.norms[0] == "batch":
            gram, sums = self._second_moments_of_x()
            self.take_sums()
            total = sums if call.settings.group is None else sum_over_processes(sums[None], call.settings.group)
            tail = call.empty(channels, channels, dtype=call.dtype)
            bias, mean = call.empty(channels), call.empty(channels)
        folded, tiles = call.like(weight), fold_gradient_tiles(channels)
        columns = cdiv(channels, tiles.sizes["TILE_C"])
        shared = {"p_weight": weight, "p_gradient": gradient1, "p_mean": mean}
        results = {"p_folded": folded, "p_tail": tail, "p_bias": bias}
        grid = (1 if tail is None else columns, columns)
        call.launch(leff_fold_gradient_kernel, grid, tiles, **shared, **results, p_total=self.count, p_sums=total)
        dx = None
        if self.need_x:
            tokens = None if tail is None else call.x
            dx = self._dx(folded, p_a=g1, OPERAND="plain", p_bias=bias, p_tokens=tokens, p_mean=mean, p_tail=tail)
        if self.needs[0][0]:
            partial, _ = self._weight_partial(call.E, channels, p_a=g1, OPERAND="plain", p_tokens=call.x)
            parameter, tiles = call.layers[0].weight, factored_weight_tiles(channels)
            gradient = call.empty(*parameter.shape, dtype=parameter.dtype)
            grid = (cdiv(call.E, tiles.sizes["TILE_E"]), cdiv(channels, tiles.sizes["TILE_C"]))
            moments = {"p_gram": gram, "p_sums": sums, "p_partial": partial, "S": partial.shape[0]}
            moments["PRECISION"] = short_precision()
            call.launch(leff_factored_weight_kernel, grid, tiles, **shared, **moments, p_out=gradient)
            self.gradients[0][0] = gradient
        return dx

    def _second_moments_of_x(self) -> tuple[Tensor, Tensor]:
        """x^T x (C, C) and the sums of x (C,) over the image tokens."""
        call, x = self.call, self.call.x
        operand = {"p_a": x, "OPERAND": "plain", "PA": call.settings.num_prefix_tokens}
        partial, sums = self._weight_partial(call.C, call.C, with_sums=True, p_tokens=x, **operand)
        return self._sum(partial, call.C, call.C), self._sum(sums, call.C)

    def _dx(self, weight: Tensor, **arguments: Any) -> Tensor:
        """The gradient of x: an operand (M, E) times a weight (E, C), and the rest of ``arguments``."""
        call = self.call
        arguments |= {"p_weight": weight, "p_prefix": self.dout, "O": call.C, "STRIDE_O": 1, "STRIDE_E": call.C}

        def run(tiles: Tiles) -> Tensor:
            dx, grid = call.like(call.x), contract_grid(call, tiles, call.C)
            call.launch(leff_contract_operand_kernel, grid, tiles, **arguments, p_out=dx)
            return dx

        table = contract_tiles(call.C, call.dtype, call.chip)
        key = {"E": call.E, "O": call.C, "operand": arguments["OPERAND"]}
        return call.tuned("leff_contract_operand", table, key, run)

    def _weight3(self, dz3: Tensor, prefix: int) -> Tensor:
        call, weight = self.call, self.call.layers[2].weight
        operand = {"p_a": self.z2, "p_rows": self.norms[1], "OPERAND": call.settings.activations[1]}
        layout = {"STRIDE_E": 1, "STRIDE_C": call.E, "P": prefix}
        partial, _ = self._weight_partial(call.E, call.O, **operand, **layout, p_tokens=dz3)
        return self._sum(partial, *weight.shape, dtype=weight.dtype)

    def _weight_partial(
        self, width: int, channels: int, with_sums: bool = False, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Partial sums of operand^T tokens (width, channels), and of the operand if wanted."""
        call = self.call
        arguments = {"PA": 0, "E": width, "C": channels, "STRIDE_E": channels, "STRIDE_C": 1, **arguments}

        def run(tiles: Tiles) -> tuple[Tensor, Tensor | None]:
            grid = (cdiv(width, tiles.sizes["TILE_E"]), cdiv(channels, tiles.sizes["TILE_C"] * tiles.sizes["NUM_C"]))
            rows, splits = _split(call.M, grid[0] * grid[1], tiles.sizes["TILE_M"])
            partial = call.empty(splits, width * channels)
            sums = call.empty(splits, width) if with_sums else None
            results = {"p_partial": partial, "p_sums": sums, "ROWS": rows}
            call.launch(leff_weight_gradient_kernel, (*grid, splits), tiles, **arguments, **results)
            return partial, sums

        table = weight_gradient_tiles(channels, width, call.dtype, call.chip)
        key = {"E": width, "C": channels, "operand": arguments["OPERAND"], "sums": with_sums}
        return call.tuned("leff_weight_gradient", table, key, run)

    def _sum(self, partial: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Where ``take_sums`` puts the sum of partial results, in ``acc_dtype`` unless told otherwise."""
        out = self.call.empty(*shape, dtype=dtype)
        self.partials.append((partial, out))
        return out

    def take_sums(self) -> None:
        """Take the sums that wait, if any."""
        pairs = [*self.partials, *[(None, None)] * (3 - len(self.partials)), self.taps or (None, None)]
        self.partials, self.taps = [], None
        outs = [1 if out is None else out.numel() for _, out in pairs]
        tiles = sum(
            cdiv(n, SUMS.sizes["TILE_N"]) for n, (partial, _) in zip(outs, pairs, strict=True) if partial is not None
        )
        if tiles == 0:
            return
        known: dict[str, Any] = {"TAPS": self.call.kernel_size**2}
        for i, (partial, out) in enumerate(pairs, 1):
            parts = 1 if partial is None else partial.shape[0]
            known |= {f"p_partial{i}": partial, f"p_out{i}": out, f"S{i}": parts, f"N{i}": outs[i - 1]}
        self.call.launch(leff_sums_kernel, (tiles,), SUMS, **known)


def _split(tokens: int, programs: int, step: int) -> tuple[int, int]:
    """Tokens of a partial GEMM, and how many of these: enough for every SM of an H100, each of several steps."""
    wanted = max(1, min(132 // programs, cdiv(tokens, 8 * step)))
    rows = cdiv(cdiv(tokens, wanted), step) * step
    return rows, cdiv(tokens, rows)
