"""LeFF's backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.launch import cdiv, one_publishes_for_all
from ...common.plan import buffers_like, compute, planned
from ...common.precision import short_precision
from ...common.sync_norm import sum_over_processes
from ...common.tuning import Tiles
from ..arguments import PARAMETER_NAMES, SAVED_NAMES, SHAPED, Settings
from . import GRADIENT_ROWS
from .kernels_depthwise import leff_depthwise_backward_kernel
from .kernels_factored import leff_factored_gradient_kernel, leff_factored_product_kernel
from .kernels_gemm import leff_contract_operand_kernel, leff_hidden_gradient_kernel, leff_weight_gradient_kernel
from .kernels_norm import leff_norm_gradient_kernel, leff_norm_sums_kernel
from .kernels_reduce import leff_reduce_kernel
from .kernels_stream import leff_slope_kernel
from .launch_common import ROWS, SMS, Call, even_parts, groups_of, linear_input_gradient, linear_weight_gradient
from .launch_forward import contract_grid, depthwise_grid, depthwise_tickets
from .tiles import (
    PARTS,
    contract_tiles,
    depthwise_tiles,
    factored_tiles,
    hidden_gradient_tiles,
    row_tiles,
    stream_tiles,
    weight_gradient_tiles,
)

__all__ = ["leff_backward_triton"]


def leff_backward_triton(
    dout: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    settings: Settings,
    need_x: bool,
    needs: Sequence[bool],
    shares: bool = False,
) -> Sequence[Tensor | None]:
    """At most eight launches that go over the tokens, fewer where not every gradient is wanted.

    Args:
        dout: gradient of the result.
        x, parameters, settings: of the forward pass.
        saved: what it returned behind its result.
        need_x: whether the gradient of x is wanted.
        needs: whether those of weight, bias, norm weight and norm bias of each layer are.
        shares: whether those of biases and norms may lie in one storage.

    Returns:
        These gradients, None where not wanted.
    """
    return _run(x, *parameters, dout, *saved, settings, need_x, tuple(needs), shares)


@planned(tensors=2 + len(PARAMETER_NAMES) + len(SAVED_NAMES), shaped=SHAPED)
def _run(x: Tensor, *rest: Any) -> list[Tensor | None]:
    *tensors, settings, need_x, needs, shares = rest
    parameters, (dout, *saved) = tensors[: len(PARAMETER_NAMES)], tensors[len(PARAMETER_NAMES) :]
    backward = _Backward(Call(x, parameters, settings), saved, dout, need_x, needs, shares)
    dx = backward.run()
    backward.take_sums()
    return [dx, *(gradient for layer in backward.gradients for gradient in layer)]


def _is_factored(dtype: torch.dtype) -> bool:
    """Whether the first layer's gradients are computed as ``kernels_factored`` has it."""
    return dtype.itemsize <= 2


class _Backward:
    def __init__(
        self, call: Call, saved: Sequence[Tensor], dout: Tensor, need_x: bool, needs: Sequence[bool], shares: bool
    ) -> None:
        self.call, self.dout, self.need_x, self.shares = call, dout, need_x, shares
        self.z1, self.z2, self.z3, *norms, self.count = saved
        self.norms = [norm if norm.numel() else None for norm in norms]
        self.needs = [needs[i : i + 4] for i in (0, 4, 8)]
        self.gradients: list[list[Tensor | None]] = [[None] * 4 for _ in self.needs]
        # Partial results, of the taps and of others, that wait for one launch to sum them, and where the sums go.
        self.taps: tuple[Tensor, Tensor] | None = None
        self.partials: list[tuple[Tensor, Tensor]] = []
        self.tickets: Tensor | None = None
        self.moments: tuple[Tensor, Tensor] | None = None  # x^T x (C, C) and the sums (C,) of x, once they are taken
        call.known |= {"p_dout": dout, "p_z1": self.z1, "p_z2": self.z2, "p_z3": self.z3}
        call.known |= {f"p_norm{i}": norm for i, norm in enumerate(self.norms, 1)}

    def run(self) -> Tensor | None:
        """The gradient of x if that is wanted; fills ``gradients``, from the last layer down."""
        call, (need_weight1, need_weight2, need_weight3) = self.call, (need[0] for need in self.needs)
        below1 = self.need_x or need_weight1
        below2 = self.need_x or any(self.needs[0]) or need_weight2
        below3 = below2 or any(self.needs[1])
        dz3, prefix = self._dz3(below3 or need_weight3)
        factored = _is_factored(call.dtype)
        moments = below1 and factored and call.settings.norms[0] == "batch"
        by_library = call.settings.backend == "library"
        # Then the pass for g2 keeps the operand of a GEMM.
        need_h2 = by_library and need_weight3 and below3 and not prefix
        need_weight3 &= not need_h2
        if need_weight3 or moments:
            self._weight3(dz3, prefix, need_weight3, moments)
        if not below3:
            return None
        if by_library:
            g2, gradient2 = self._g2_by_library(dz3, prefix, below2, need_h2)
        else:
            g2, gradient2 = self._g2(dz3, prefix, below2)
        if not below2:
            return None
        g1, gradient1 = self._g1(g2, gradient2, below1)
        if not below1:
            return None
        return self._layer1_factored(g1, gradient1) if factored else self._layer1(g1, gradient1, g2)

    def _coefficients(self, layer: int, partial: Tensor, wanted: bool) -> Tensor | None:
        """The gradients of the layer's vectors, and its gradient array if that is wanted; takes the sums that wait."""
        if not (wanted or any(self.needs[layer][1:])):
            return None
        known, gradient = self._vectors(layer), None
        if wanted:
            partial, known = self._over_processes(layer, partial, known)
            gradient = self.call.empty(GRADIENT_ROWS, partial.shape[-1])
        self._reduce(partial, p_gradient=gradient, **known)
        return gradient

    def _vectors(self, layer: int) -> dict[str, Tensor | None]:
        """What the gradients of the layer's vectors are taken of and where they go."""
        needs = self.needs[layer][1:]
        vectors = self.gradients[layer][1:] = buffers_like(self.call.layers[layer][1:4], needs, self.shares)
        known = dict(zip(("p_dbias", "p_dnorm_weight", "p_dnorm_bias"), vectors, strict=True))
        total = self.count if self.call.settings.norms[layer] == "batch" else None
        return {**known, "p_norm": self.norms[layer], "p_total": total}

    def _over_processes(
        self, layer: int, partial: Tensor, known: dict[str, Tensor | None]
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The sums of all processes where they share their statistics, and what is left to do with them."""
        call, group = self.call, self.call.settings.group
        if group is None or call.settings.norms[layer] != "batch":
            return partial, known
        sums = call.empty(1, 2, partial.shape[-1])
        self._reduce(partial, p_sums=sums, **known)
        return sum_over_processes(sums, group), {name: known[name] for name in ("p_norm", "p_total")}

    def _dz3(self, wanted: bool) -> tuple[Tensor, int]:
        """The gradient of z3 if that is wanted, and the prefix tokens that it has before each image's."""
        call, prefix = self.call, self.call.settings.num_prefix_tokens
        wanted = wanted and self.norms[2] is not None
        if not (wanted or any(self.needs[2][1:])):
            return self.dout, prefix
        tiles = row_tiles(call.O)
        rows, parts = even_parts(call.M, SMS, tiles.sizes["TILE_M"])
        columns, partial = cdiv(call.O, tiles.sizes["TILE_O"]), call.empty(parts, 2, call.O)
        arguments = {"p_partial": partial, "p_tickets": self._tickets(cdiv(call.M, ROWS)), "ROWS": rows}
        counters = 0 if self.tickets is None else self.tickets.numel()
        call.launch(leff_norm_sums_kernel, (parts, columns), tiles, **arguments, COUNTERS=counters)
        if not wanted:
            self._coefficients(2, partial, False)
            return self.dout, prefix
        partial, known = self._over_processes(2, partial, self._vectors(2))
        dz3 = call.like(self.z3)
        arguments = {"p_partial": partial, "T": partial.shape[0], "p_dz3": dz3, "ROWS": rows}
        call.launch(leff_norm_gradient_kernel, (parts, columns), tiles, **arguments, **known)
        return dz3, 0

    def _tickets(self, parts: int) -> Tensor | None:
        """Counters for ``_g2_by_library`` and ``_g1``, one after another, if program instances can know who is last."""
        call = self.call
        if one_publishes_for_all():
            columns = cdiv(call.E, stream_tiles(call.E).sizes["TILE_E"])
            count = max(columns * (1 + groups_of(parts)[1]), depthwise_tickets(call))
            self.tickets = call.empty(count, dtype=torch.int32)
        return self.tickets

    def _sums(self, layer: int, parts: int, wanted: bool) -> dict[str, Any]:
        """Where a kernel leaves the partial sums of a layer's norm, and with tickets what its last program instance
        makes of them, unless other processes have some too.
        """
        call, known = self.call, {"T": parts, "GROUP": 1}
        shared = call.settings.group is not None and call.settings.norms[layer] == "batch"
        if self.tickets is None or shared or not (wanted or any(self.needs[layer][1:])):
            return {**known, "p_partial": call.empty(parts, 2, call.E)}
        known["GROUP"], groups = groups_of(parts)
        gradient = call.empty(GRADIENT_ROWS, call.E) if wanted else None
        known |= {"p_partial": call.empty(parts + groups, 2, call.E), "p_tickets": self.tickets, "p_gradient": gradient}
        return {**known, **self._vectors(layer)}

    def _gradient(self, layer: int, sums: dict[str, Any], wanted: bool) -> Tensor | None:
        """The layer's gradient array, if wanted, of the sums that such a kernel left, or that array."""
        return sums["p_gradient"] if "p_tickets" in sums else self._coefficients(layer, sums["p_partial"], wanted)

    def _g2_by_library(self, dz3: Tensor, prefix: int, wanted: bool, need_h2: bool) -> tuple[Tensor, Tensor | None]:
        """As ``_g2``, by PyTorch's GEMM, whose result becomes that of the norm's output where it lies; and the gradient
        of the last weight by another, of h2.
        """
        call, tiles = self.call, stream_tiles(self.call.E)
        dh2 = compute(linear_input_gradient, dz3, call.layers[2].weight, call.dtype)
        g2, h2 = call.like(self.z2) if prefix else dh2, call.like(self.z2) if need_h2 else None
        parts = cdiv(call.M, ROWS)
        arguments = {"p_dh2": dh2, "p_g2": g2, "p_h2": h2, "P": prefix, "ROWS": ROWS}
        arguments |= {"ACTIVATION": call.settings.activations[1], **(sums := self._sums(1, parts, wanted))}
        call.launch(leff_slope_kernel, (parts, cdiv(call.E, tiles.sizes["TILE_E"])), tiles, **arguments)
        if h2 is not None:
            self.gradients[2][0] = compute(linear_weight_gradient, dz3, h2, call.layers[2].weight)
        return g2, self._gradient(1, sums, wanted)

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
        g2, partial = call.tuned(leff_hidden_gradient_kernel, table, {"E": call.E, "O": call.O}, run)
        return g2, self._coefficients(1, partial, wanted)

    def _g1(self, g2: Tensor, gradient2: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """The gradient of the first norm's output, and the norm's gradient array if that is wanted."""
        call = self.call
        tiles = depthwise_tiles(call.settings.width, call.E, call.kernel_size, call.dtype)
        images, parts, grid = depthwise_grid(call, tiles)
        if self.partials:  # they take a launch in any case
            self.tickets = None
        g1, sums = call.like(g2), self._sums(0, parts, wanted)
        taps_gradient = call.empty(parts, call.kernel_size**2, call.E)
        arguments = {"p_g2": g2, "p_gradient2": gradient2, "ACTIVATION": call.settings.activations[0]}
        arguments |= {"p_g1": g1, "p_taps_gradient": taps_gradient, "IMAGES": images, **sums}
        call.launch(leff_depthwise_backward_kernel, grid, tiles, **arguments)
        if self.needs[1][0]:
            gradient = self.gradients[1][0] = call.like(call.layers[1].weight)
            self.taps = taps_gradient, gradient
        return g1, self._gradient(0, sums, wanted)

    def _layer1(self, g1: Tensor, gradient1: Tensor | None, scratch: Tensor) -> Tensor | None:
        """The gradients of x and of the first weight from the gradient of the first norm's output."""
        need_weight, weight = self.needs[0][0], self.call.layers[0].weight
        prefix = self.call.known["P1"]
        z1 = compute(_image_rows, self.z1, self.call.x.shape[0], prefix) if prefix else self.z1
        operand = {"p_a": g1, "p_z": z1, "p_rows": gradient1, "OPERAND": "gradient"}
        dx = None
        if self.need_x:
            result = {"p_operand": scratch if need_weight else None}
            dx = self._dx(leff_contract_operand_kernel, p_weight=self.call.weight(0), **operand, **result)
            operand = {"p_a": scratch, "OPERAND": "plain"}  # the gradient of z1
        if need_weight:
            tokens = {"p_tokens": self.call.x}
            partial, *_ = self._partial(leff_weight_gradient_kernel, self.call.C, **tokens, **operand)
            self.gradients[0][0] = partial if partial is None else self._sum(partial, *weight.shape, dtype=weight.dtype)
        return dx

    def _layer1_factored(self, g1: Tensor, gradient1: Tensor | None) -> Tensor | None:
        """The same, as ``kernels_factored`` has it."""
        call, (need_weight, *_) = self.call, self.needs[0]
        taps, self.taps = self.taps, None
        factors = {"p_weight": call.weight(0), "p_gradient": gradient1}
        folded, moments, first = {}, {}, {}
        if self.moments is not None:
            gram, sums = self.moments
            group = call.settings.group
            first = {"p_gram": gram, "p_sums": sums}
            moments = {"p_all_sums": sums if group is None else sum_over_processes(sums[None], group)}
            moments |= {"p_total": self.count}
        if self.need_x:
            folded = {"p_folded": call.like(factors["p_weight"]), "p_tail": None, "p_bias": None}
            if moments:
                folded |= {"p_tail": call.empty(call.C, call.C, dtype=call.dtype), "p_bias": call.empty(call.C)}
        product = {"p_a": g1, "p_tokens": call.x} if need_weight else {}
        partial, *_ = self._partial(leff_factored_product_kernel, call.C, need_weight, **product, **factors, **folded)
        known: dict[str, Any] = {**moments, "S": 1, "T": 1, "SHORT": short_precision()}
        if taps is not None:
            known |= {"p_taps_gradient": taps[0], "p_dweight2": taps[1], "T": taps[0].shape[0]}
        if partial is not None:
            gradient = self.gradients[0][0] = call.like(call.layers[0].weight)
            known |= {**factors, **first, "p_partial": partial, "S": partial.shape[0], "p_dweight": gradient}
        if self.need_x:
            known |= {**folded, "p_a": g1, "p_tokens": call.x if moments else None}
        return self._dx(leff_factored_gradient_kernel, **known)

    def _dx(self, kernel: Any, **arguments: Any) -> Tensor | None:
        """The gradient of x if that is wanted: an operand (M, E) times a weight (E, C), and what ``arguments`` add."""
        call = self.call
        arguments = {"OPERAND": "plain", "O": call.C, "STRIDE_O": 1, "STRIDE_E": call.C, **arguments}

        def run(tiles: Tiles) -> Tensor | None:
            tiles, dx, programs = factored_tiles(tiles, call.C), None, 0
            if "p_dweight" in arguments:
                programs += cdiv(call.E, tiles.sizes["WEIGHT_E"]) * cdiv(call.C, tiles.sizes["WEIGHT_C"])
            if "p_dweight2" in arguments:
                programs += cdiv(arguments["p_dweight2"].numel(), tiles.sizes["TILE_N"])
            if self.need_x:
                dx = call.like(call.x)
                programs += contract_grid(call, tiles, call.C)[0]
            call.launch(kernel, (programs,), tiles, **arguments, p_out=dx, p_prefix=None if dx is None else self.dout)
            return dx

        table = contract_tiles(call.C, call.dtype, call.chip)
        key = {"E": call.E, "O": call.C, "operand": arguments["OPERAND"], "x": self.need_x}
        return call.tuned(kernel, table, key, run)

    def _weight3(self, dz3: Tensor, prefix: int, wanted: bool, moments: bool) -> None:
        """What goes over the tokens for the gradient of the last weight and for the second moments of x."""
        call, weight = self.call, self.call.layers[2].weight
        operand: dict[str, Any] = {"STRIDE_E": 1, "STRIDE_C": call.E, "P": prefix}
        if wanted:
            activation = call.settings.activations[1]
            operand |= {"p_a": self.z2, "p_rows": self.norms[1], "OPERAND": activation, "p_tokens": dz3}
        partial, gram, sums = self._partial(leff_weight_gradient_kernel, call.O, wanted, moments, **operand)
        if partial is not None:
            self.gradients[2][0] = self._sum(partial, *weight.shape, dtype=weight.dtype)
        if gram is not None and sums is not None:
            self.moments = self._sum(gram, call.C, call.C), self._sum(sums, call.C)

    def _partial(
        self, kernel: Any, channels: int, product: bool = True, moments: bool = False, **arguments: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Partial sums of operand^T tokens (E, channels), of x^T x (C, C) and of x (C,), where wanted."""
        call = self.call
        arguments = {"STRIDE_E": channels, "STRIDE_C": 1, "OPERAND": "plain", **arguments}
        arguments |= {"C": channels, "CX": call.C, "PX": call.settings.num_prefix_tokens}
        arguments["p_x"] = call.x if moments else None

        def run(tiles: Tiles) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            tiles = factored_tiles(tiles, call.C)
            tile_m, tile_e, tile_c = (tiles.sizes[name] for name in ("TILE_M", "TILE_E", "TILE_C"))
            count = tiles.sizes["NUM_C"]
            programs = product * cdiv(call.E, tile_e) * cdiv(channels, tile_c * count)
            # Of a symmetric matrix; they take one tile each, and about half as long.
            of_moments = moments * sum(cdiv(call.C, tile_c) - row // tile_c for row in range(0, call.C, tile_e))
            folds = 0
            if "p_folded" in arguments:
                columns = cdiv(call.C, tiles.sizes["FOLD_C"])
                folds = columns if arguments["p_tail"] is None else columns**2
            rows, splits = _split(call.M, max(programs + of_moments // (1 + product), 1), tile_m, folds)
            partial = call.empty(splits, call.E * channels) if product else None
            gram, sums = (call.empty(splits, call.C**n) if moments else None for n in (2, 1))
            programs = (programs + of_moments) * splits + folds
            results = {"p_partial": partial, "p_gram": gram, "p_sums": sums, "ROWS": rows, "UPPER": of_moments}
            if programs:
                call.launch(kernel, (programs,), tiles, **{**arguments, **results})
            return partial, gram, sums

        table = weight_gradient_tiles(channels, call.E, call.dtype, call.chip, not product)
        key = {"E": call.E, "C": channels, "operand": arguments["OPERAND"], "moments": moments, "product": product}
        return call.tuned(kernel, table, key, run)

    def _sum(self, partial: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Where ``take_sums`` puts the sum of partial results, in ``acc_dtype`` unless told otherwise."""
        out = self.call.empty(*shape, dtype=dtype)
        self.partials.append((partial, out))
        return out

    def take_sums(self) -> None:
        """Take the sums that wait, if any."""
        if self.partials or self.taps:
            self._reduce(None)

    def _reduce(self, partial: Tensor | None, **arguments: Any) -> None:
        """Reduce the partial sums of a norm's gradient, if given, and take the sums that wait."""
        pairs = [*self.partials, *[(None, None)] * (3 - len(self.partials)), self.taps or (None, None)]
        self.partials, self.taps = [], None
        known, programs = {**arguments, "p_partial": partial, "T": 1, "TAPS": self.call.kernel_size**2}, 0
        if partial is not None:
            known |= {"T": partial.shape[0], "E": partial.shape[-1]}
            programs = cdiv(partial.shape[-1], PARTS.sizes["TILE_E"])
        for i, (parts, out) in enumerate(pairs, 1):
            count, numbers = (1, 1) if parts is None or out is None else (parts.shape[0], out.numel())
            known |= {f"p_partial{i}": parts, f"p_out{i}": out, f"S{i}": count, f"N{i}": numbers}
            programs += 0 if parts is None else cdiv(numbers, PARTS.sizes["TILE_N"])
        self.call.launch(leff_reduce_kernel, (programs,), PARTS, **known)


def _image_rows(z: Tensor, images: int, prefix: int) -> Tensor:
    """Rows of tokens without those of each image's prefix."""
    return z.unflatten(0, (images, -1))[:, prefix:].flatten(0, 1).contiguous()


def _split(tokens: int, programs: int, step: int, others: int) -> tuple[int, int]:
    """Tokens of a partial GEMM, and how many of these: enough for every SM of an H100 but for those that others keep
    busy, each of several steps.
    """
    wanted = max(1, min((SMS - others) // programs, cdiv(tokens, 8 * step)))
    rows = cdiv(cdiv(tokens, wanted), step) * step
    return rows, cdiv(tokens, rows)
