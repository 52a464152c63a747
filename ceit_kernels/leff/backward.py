"""LeFF's backward pass, as a pipeline of Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from triton import cdiv

from .blocks import (
    PARTS,
    Blocks,
    contract_blocks,
    depthwise_blocks,
    factored_weight_blocks,
    fold_gradient_blocks,
    hidden_gradient_blocks,
    row_blocks,
    sum_blocks,
    weight_gradient_blocks,
)
from .forward import images_per_program
from .kernels import GRADIENT_ROWS
from .kernels.depthwise import leff_depthwise_backward_kernel
from .kernels.factored import leff_factored_weight_kernel, leff_fold_gradient_kernel
from .kernels.norm import leff_norm_gradient_kernel, leff_norm_sums_kernel
from .kernels.products import leff_contract_operand_kernel, leff_hidden_gradient_kernel, leff_weight_gradient_kernel
from .kernels.statistics import leff_coefficients_kernel, leff_sum_kernel
from .problem import Forward, Needs, Problem

__all__ = ["leff_backward_triton"]

_ROWS = 512  # tokens of which a program instance of the norm's sums takes the sum


def leff_backward_triton(
    problem: Problem, saved: Forward, dout: Tensor, need_x: bool, needs: Sequence[Needs]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """At most eight launches that go over the tokens, fewer where not every gradient is wanted.

    Args:
        problem: of the forward pass.
        saved: what it returned.
        dout: gradient of the result, contiguous.
        need_x: whether the gradient of x is wanted.
        needs: the gradients that are wanted of each layer.

    Returns:
        The gradient of x, and those of weight, bias, norm weight and norm bias of each layer; None where not wanted.
    """
    return _Backward(problem, saved, dout, need_x, needs).run()


class _Backward:
    def __init__(self, problem: Problem, saved: Forward, dout: Tensor, need_x: bool, needs: Sequence[Needs]) -> None:
        self.problem, self.saved, self.dout, self.need_x, self.needs = problem, saved, dout, need_x, needs
        self.gradients: list[list[Tensor | None]] = [[None] * 4 for _ in needs]

    def run(self) -> tuple[Tensor | None, list[Tensor | None]]:
        below3 = self.need_x or any(any(need) for need in self.needs[:2])
        below2 = self.need_x or any(self.needs[0]) or self.needs[1].weight
        below1 = self.need_x or self.needs[0].weight
        gradient3 = self._norm3_gradient(below3 or self.needs[2].weight)
        dx = None
        if below3 or self.needs[2].weight:
            dz3, prefix = self._dz3(gradient3)
            if self.needs[2].weight:
                self.gradients[2][0] = self._weight3(dz3, prefix)
            if below3:
                g2, gradient2 = self._g2(dz3, prefix, below2)
                if below2:
                    g1, gradient1 = self._g1(g2, gradient2, below1)
                    if below1:
                        dx = self._first_layer(g1, gradient1, scratch=g2)
        return dx, [gradient for layer in self.gradients for gradient in layer]

    def _coefficients(self, layer: int, partial: Tensor, norm: Tensor, wanted: bool) -> Tensor | None:
        """The gradients of the layer's vectors, and its gradient array if that is wanted."""
        problem, needs = self.problem, self.needs[layer]
        parameters, mode = problem.layers[layer], problem.norms[layer]
        if not (wanted or needs.sums):
            return None
        channels = partial.shape[-1]
        vectors = (parameters.bias, parameters.norm_weight, parameters.norm_bias)
        made = [torch.empty_like(v) if need else None for v, need in zip(vectors, needs[1:], strict=True)]
        self.gradients[layer][1:] = made
        sums, gradient = problem.empty(1, 2, channels), problem.empty(GRADIENT_ROWS, channels)

        def reduce(partial: Tensor, dconvolution: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> None:
            problem.launch(
                leff_coefficients_kernel,
                (cdiv(channels, PARTS.sizes["BE"]),),
                PARTS,
                {
                    "p_partial": partial,
                    "p_norm": norm,
                    "p_total": self.saved.count,
                    "p_sums": sums,
                    "p_gradient": gradient,
                    "p_dweight": dweight,
                    "p_dbias": dbias,
                    "p_dconvolution": dconvolution,
                    "T": partial.shape[0],
                    "E": channels,
                    "NORM": mode != "none",
                    "BATCH": mode == "batch",
                },
            )

        reduce(partial, *made)
        if problem.group is not None and mode == "batch" and wanted:
            total = sums.clone()
            dist.all_reduce(total, group=problem.group)
            reduce(total, None, None, None)
        return gradient

    def _norm3_gradient(self, wanted: bool) -> Tensor | None:
        problem, mode = self.problem, self.problem.norms[2]
        if not (self.needs[2].sums or (wanted and mode != "none")):
            return None
        blocks, channels = row_blocks(problem.out_features), problem.out_features
        parts = cdiv(problem.tokens, _ROWS)
        partial = problem.empty(parts, 2, channels)
        problem.launch(
            leff_norm_sums_kernel,
            (parts, cdiv(channels, blocks.sizes["BO"])),
            blocks,
            {
                "p_dout": self.dout,
                "p_z3": self.saved.z3,
                "p_norm3": self.saved.norm3,
                "p_partial": partial,
                "ROWS": _ROWS,
                "NORM": mode != "none",
            },
        )
        return self._coefficients(2, partial, self.saved.norm3, wanted)

    def _dz3(self, gradient3: Tensor | None) -> tuple[Tensor, int]:
        """The gradient of z3, and the prefix tokens that it has before each image's."""
        problem = self.problem
        if problem.norms[2] == "none":
            return self.dout, problem.num_prefix_tokens
        blocks, dz3 = row_blocks(problem.out_features), torch.empty_like(self.saved.z3)
        problem.launch(
            leff_norm_gradient_kernel,
            (cdiv(problem.tokens, blocks.sizes["BM"]), cdiv(problem.out_features, blocks.sizes["BO"])),
            blocks,
            {"p_dout": self.dout, "p_z3": self.saved.z3, "p_gradient3": gradient3, "p_dz3": dz3},
        )
        return dz3, 0

    def _g2(self, dz3: Tensor, prefix: int, wanted: bool, blocks: Blocks | None = None) -> tuple[Tensor, Tensor | None]:
        problem, hidden = self.problem, self.problem.hidden_features
        if blocks is None:
            blocks = problem.tuned(
                "leff_hidden_gradient",
                hidden_gradient_blocks(problem.out_features, hidden, problem.dtype, problem.chip),
                {"E": hidden, "O": problem.out_features},
                lambda blocks: self._g2(dz3, prefix, wanted, blocks),
            )
        rows = cdiv(problem.tokens, blocks.sizes["BM"])
        g2, partial = torch.empty_like(self.saved.z2), problem.empty(rows, 2, hidden)
        problem.launch(
            leff_hidden_gradient_kernel,
            (rows * cdiv(hidden, blocks.sizes["BE"]),),
            blocks,
            {
                "p_dz3": dz3,
                "p_weight": problem.weight(2),
                "p_z2": self.saved.z2,
                "p_norm2": self.saved.norm2,
                "p_g2": g2,
                "p_partial": partial,
                "P": prefix,
                "NORM": problem.norms[1] != "none",
                "ACTIVATION": problem.activations[1],
            },
        )
        return g2, self._coefficients(1, partial, self.saved.norm2, wanted)

    def _g1(self, g2: Tensor, gradient2: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        problem, hidden, width = self.problem, self.problem.hidden_features, self.problem.grid_size[1]
        blocks = depthwise_blocks(width, hidden, problem.kernel_size, problem.dtype)
        columns, channels = cdiv(width, blocks.sizes["BW"]), cdiv(hidden, blocks.sizes["BE"])
        images = images_per_program(problem, columns * channels)
        parts, taps = cdiv(problem.x.shape[0], images) * columns, problem.taps()
        g1, partial = torch.empty_like(g2), problem.empty(parts, 2, hidden)
        taps_gradient = problem.empty(parts, *taps.shape)
        problem.launch(
            leff_depthwise_backward_kernel,
            (parts * channels,),
            blocks,
            {
                "p_g2": g2,
                "p_z2": self.saved.z2,
                "p_z1": self.saved.z1,
                "p_gradient2": gradient2,
                "p_norm1": self.saved.norm1,
                "p_taps": taps,
                "p_g1": g1,
                "p_taps_gradient": taps_gradient,
                "p_partial": partial,
                "IMAGES": images,
                "NORM": problem.norms[0] != "none",
                "ACTIVATION": problem.activations[0],
            },
        )
        if self.needs[1].weight:
            weight = problem.layers[1].weight
            summed = self._sum(taps_gradient, torch.empty_like(taps, dtype=weight.dtype))
            self.gradients[1][0] = summed.t().contiguous().view_as(weight)
        return g1, self._coefficients(0, partial, self.saved.norm1, wanted)

    def _first_layer(self, g1: Tensor, gradient1: Tensor, scratch: Tensor) -> Tensor | None:
        """The gradients of x and of the first weight from the gradient of the first norm's output."""
        if self.problem.dtype.itemsize <= 2:
            return self._first_layer_factored(g1, gradient1)
        dx = None
        if self.need_x:
            # Leaves the gradient of z1 behind for the weight's.
            operand = {"p_a": g1, "p_z": self.saved.z1, "p_rows": gradient1, "OPERAND": "gradient"}
            keep = {"p_operand": scratch, "KEEP_OPERAND": self.needs[0].weight}
            dx = self._dx({**operand, **keep, "p_weight": self.problem.weight(0)})
        if self.needs[0].weight:
            operand = {"p_a": g1, "p_z": self.saved.z1, "p_rows": gradient1, "OPERAND": "gradient"}
            if self.need_x:
                operand = {"p_a": scratch, "p_z": None, "p_rows": None, "OPERAND": "plain"}
            weight = self.problem.layers[0].weight
            partial = self._weight_partial(self.problem.x.shape[2], {**operand, **self._tokens_of_x()})
            self.gradients[0][0] = self._sum(partial, torch.empty_like(weight, memory_format=torch.contiguous_format))
        return dx

    def _first_layer_factored(self, g1: Tensor, gradient1: Tensor) -> Tensor | None:
        """The same, as ``kernels.factored`` has it."""
        problem, hidden, channels = self.problem, self.problem.hidden_features, self.problem.x.shape[2]
        weight = problem.weight(0)
        has_tail = problem.norms[0] == "batch"
        tail = bias = mean = products = sums = total = None
        if has_tail:
            products, sums = self._second_moments_of_x()
            total = sums
            if problem.group is not None:
                total = sums.clone()
                dist.all_reduce(total, group=problem.group)
            tail = problem.empty(channels, channels, dtype=problem.dtype)
            bias, mean = problem.empty(channels), problem.empty(channels)
        folded, blocks = torch.empty_like(weight), fold_gradient_blocks(channels)
        columns = cdiv(channels, blocks.sizes["BC"])
        shared = {"p_weight": weight, "p_gradient": gradient1, "p_mean": mean, "HAS_TAIL": has_tail}
        problem.launch(
            leff_fold_gradient_kernel,
            (columns if has_tail else 1, columns),
            blocks,
            {
                **shared,
                "p_folded": folded,
                "p_tail": tail,
                "p_bias": bias,
                "p_total": self.saved.count,
                "p_sums": total,
            },
        )
        dx = None
        if self.need_x:
            operand = {"p_a": g1, "p_z": None, "p_rows": None, "OPERAND": "plain"}
            tokens = {"p_tokens": problem.x, "p_mean": mean, "p_tail": tail, "HAS_TAIL": has_tail}
            dx = self._dx({**operand, **tokens, "p_weight": folded, "p_bias": bias})
        if self.needs[0].weight:
            operand = {"p_a": g1, "p_z": None, "p_rows": None, "OPERAND": "plain"}
            partial = self._weight_partial(channels, {**operand, **self._tokens_of_x()})
            parameter = problem.layers[0].weight
            gradient = torch.empty_like(parameter, memory_format=torch.contiguous_format)
            blocks = factored_weight_blocks(channels)
            problem.launch(
                leff_factored_weight_kernel,
                (cdiv(hidden, blocks.sizes["BE"]), cdiv(channels, blocks.sizes["BC"])),
                blocks,
                {
                    **shared,
                    "p_partial": partial,
                    "p_products": products,
                    "p_sums": sums,
                    "p_out": gradient,
                    "S": partial.shape[0],
                },
            )
            self.gradients[0][0] = gradient
        return dx

    def _second_moments_of_x(self) -> tuple[Tensor, Tensor]:
        """x^T x (C, C) and the sums of x (C,) over the image tokens."""
        problem, channels = self.problem, self.problem.x.shape[2]
        operand = {"p_a": problem.x, "p_z": None, "p_rows": None, "OPERAND": "plain", "PA": problem.num_prefix_tokens}
        arguments = {**operand, **self._tokens_of_x(), "E": channels}
        partial, sums = self._weight_partial(channels, arguments, with_sums=True)
        products = self._sum(partial, problem.empty(channels, channels))
        return products, self._sum(sums, problem.empty(channels))

    def _tokens_of_x(self) -> dict[str, Any]:
        channels = self.problem.x.shape[2]
        how = {"NORM": True, "ACTIVATION": "identity"}
        return {"p_tokens": self.problem.x, "C": channels, "STRIDE_E": channels, "STRIDE_C": 1, **how}

    def _dx(self, arguments: dict[str, Any], blocks: Blocks | None = None) -> Tensor:
        problem, channels, dx = self.problem, self.problem.x.shape[2], torch.empty_like(self.problem.x)
        if blocks is None:
            blocks = problem.tuned(
                "leff_contract_operand",
                contract_blocks(channels, problem.dtype, problem.chip),
                {"E": problem.hidden_features, "O": channels, "operand": arguments["OPERAND"]},
                lambda blocks: self._dx(arguments, blocks),
            )
        none = dict.fromkeys(
            ("p_bias", "p_operand", "p_tokens", "p_mean", "p_tail", "p_residual", "p_partial", "p_count")
        )
        flags = {"KEEP_OPERAND": False, "HAS_TAIL": False, "HAS_RESIDUAL": False, "MOMENTS": False}
        layout = {"O": channels, "STRIDE_O": 1, "STRIDE_E": channels, "NORM": True, "ACTIVATION": "identity"}
        problem.launch(
            leff_contract_operand_kernel,
            (
                (cdiv(problem.tokens, blocks.sizes["BM"]) + problem.prefix_blocks(blocks.sizes["BM"]))
                * cdiv(channels, blocks.sizes["BO"] * blocks.sizes["NO"]),
            ),
            blocks,
            {**none, **flags, **layout, "p_prefix": self.dout, "p_out": dx, **arguments},
        )
        return dx

    def _weight3(self, dz3: Tensor, prefix: int) -> Tensor:
        problem, outputs = self.problem, self.problem.out_features
        operand = {"p_a": self.saved.z2, "p_z": None, "p_rows": self.saved.norm2, "OPERAND": "activation"}
        layout = {"C": outputs, "STRIDE_E": 1, "STRIDE_C": problem.hidden_features, "P": prefix}
        how = {"NORM": problem.norms[1] != "none", "ACTIVATION": problem.activations[1]}
        partial = self._weight_partial(outputs, {**operand, **layout, **how, "p_tokens": dz3})
        return self._sum(partial, torch.empty_like(problem.layers[2].weight, memory_format=torch.contiguous_format))

    def _weight_partial(
        self, channels: int, arguments: dict[str, Any], with_sums: bool = False, blocks: Blocks | None = None
    ) -> Any:
        """Partial sums of operand^T tokens, and of the operand if wanted."""
        problem, width = self.problem, arguments.get("E", self.problem.hidden_features)
        if blocks is None:
            blocks = problem.tuned(
                "leff_weight_gradient",
                weight_gradient_blocks(channels, width, problem.dtype, problem.chip),
                {"E": width, "C": channels, "operand": arguments["OPERAND"], "sums": with_sums},
                lambda blocks: self._weight_partial(channels, arguments, with_sums, blocks),
            )
        tiles = (cdiv(width, blocks.sizes["BE"]), cdiv(channels, blocks.sizes["BC"] * blocks.sizes["NC"]))
        rows, splits = _split(problem.tokens, tiles[0] * tiles[1], blocks)
        partial = problem.empty(splits, width * channels)
        sums = problem.empty(splits, width) if with_sums else None
        problem.launch(
            leff_weight_gradient_kernel,
            (*tiles, splits),
            blocks,
            {"PA": 0, **arguments, "p_partial": partial, "p_sums": sums, "ROWS": rows},
        )
        return (partial, sums) if with_sums else partial

    def _sum(self, partial: Tensor, out: Tensor) -> Tensor:
        blocks, parts = sum_blocks(partial.shape[0]), partial.shape[0]
        grid = (cdiv(out.numel(), blocks.sizes["BN"]),)
        self.problem.launch(
            leff_sum_kernel, grid, blocks, {"p_partial": partial, "p_out": out, "S": parts, "N": out.numel()}
        )
        return out


def _split(tokens: int, tiles: int, blocks: Blocks) -> tuple[int, int]:
    """Tokens of a partial product, and how many there are: enough for every SM of an H100, each of several steps."""
    step = blocks.sizes["BM"]
    wanted = max(1, min(132 // tiles, cdiv(tokens, 8 * step)))
    rows = cdiv(cdiv(tokens, wanted), step) * step
    return rows, cdiv(tokens, rows)
