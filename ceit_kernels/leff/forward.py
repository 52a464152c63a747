"""LeFF's forward pass in training, as a pipeline of Triton kernels."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from triton import cdiv

from .blocks import PARTS, Blocks, contract_blocks, depthwise_blocks, expand_blocks, row_blocks
from .kernels import NORM_ROWS
from .kernels.depthwise import leff_depthwise_kernel
from .kernels.norm import leff_norm_kernel
from .kernels.products import leff_contract_operand_kernel, leff_expand_moments_kernel
from .kernels.statistics import leff_statistics_kernel
from .problem import Forward, Problem

__all__ = ["images_per_program", "leff_forward_triton"]

_PROGRAMS = 4096  # enough one-warp program instances for the largest chip, few enough for their partial results


def images_per_program(problem: Problem, programs_per_image: int) -> int:
    """Images that one program instance of a depthwise kernel takes, one after another."""
    return max(1, problem.x.shape[0] * programs_per_image // _PROGRAMS)


def leff_forward_triton(problem: Problem, residual: Tensor | None, out_dtype: torch.dtype) -> Forward:
    """At most four passes over the tokens. x and residual contiguous, B at least 1."""
    count = problem.empty(1 if "batch" in problem.norms else 0)
    z1, norm1 = _expand(problem, count)
    z2, norm2 = _depthwise(problem, z1, norm1, count)
    batch, tokens, _ = problem.x.shape
    out = problem.empty(batch, tokens, problem.out_features, dtype=out_dtype)
    if problem.norms[2] == "none":
        norm3 = _contract(problem, z2, norm2, out, residual, count)
        return Forward(out, z1, z2, problem.empty(0, dtype=problem.dtype), norm1, norm2, norm3, count)
    z3 = problem.empty(problem.tokens, problem.out_features, dtype=problem.dtype)
    norm3 = _contract(problem, z2, norm2, z3, None, count)
    blocks = row_blocks(problem.out_features)
    rows = cdiv(problem.tokens, blocks.sizes["BM"]) + problem.prefix_blocks(blocks.sizes["BM"])
    problem.launch(
        leff_norm_kernel,
        (rows, cdiv(problem.out_features, blocks.sizes["BO"])),
        blocks,
        {
            "p_z3": z3,
            "p_norm3": norm3,
            "p_x": problem.x,
            "p_residual": residual,
            "p_out": out,
            "HAS_RESIDUAL": residual is not None,
        },
    )
    return Forward(out, z1, z2, z3, norm1, norm2, norm3, count)


class _Moments:
    """Partial moments of a layer's result, for as long as it takes to make a norm array of them."""

    def __init__(self, problem: Problem, layer: int, parts: int, channels: int) -> None:
        self.problem, self.layer, self.channels = problem, layer, channels
        self.wanted = problem.norms[layer] == "batch"
        self.partial = problem.empty(parts, 2, channels) if self.wanted else None
        self.counts = problem.empty(parts) if self.wanted else None

    @property
    def arguments(self) -> dict[str, Tensor | bool | None]:
        """Of the kernel that leaves them behind."""
        return {"p_partial": self.partial, "p_count": self.counts, "MOMENTS": self.wanted}

    def norm(self, count: Tensor) -> Tensor:
        """The layer's norm array; ``count`` receives the tokens that it was taken of."""
        if self.problem.norms[self.layer] == "none":
            return self.problem.empty(0)
        if not self.wanted:
            return self._frozen()
        norm = self._merge(self.partial, self.counts, count)
        if self.problem.group is None:
            return norm
        ranks = dist.get_world_size(self.problem.group)
        mine = torch.cat((norm[0], norm[1] * count, count))
        everyone = self.problem.empty(ranks * mine.numel())  # flat, as gloo wants it
        dist.all_gather_into_tensor(everyone, mine, group=self.problem.group)
        everyone = everyone.view(ranks, -1)
        partial = everyone[:, :-1].contiguous().view(ranks, 2, self.channels)
        return self._merge(partial, everyone[:, -1].contiguous(), count)

    def _merge(self, partial: Tensor, counts: Tensor, count: Tensor) -> Tensor:
        layer = self.problem.layers[self.layer]
        norm = self.problem.empty(NORM_ROWS, self.channels)
        self.problem.launch(
            leff_statistics_kernel,
            (cdiv(self.channels, PARTS.sizes["BE"]),),
            PARTS,
            {
                "p_partial": partial,
                "p_count": counts,
                "p_weight": layer.norm_weight,
                "p_bias": layer.norm_bias,
                "p_norm": norm,
                "p_total": count,
                "EPS": self.problem.eps[self.layer],
                "T": partial.shape[0],
                "E": self.channels,
            },
        )
        return norm

    def _frozen(self) -> Tensor:
        layer, wide = self.problem.layers[self.layer], self.problem.wide
        mean, variance = layer.running_mean.to(wide), layer.running_var.to(wide)
        rstd = torch.rsqrt(variance + self.problem.eps[self.layer])
        scale = rstd if layer.norm_weight is None else rstd * layer.norm_weight.to(wide)
        shift = torch.zeros_like(mean) if layer.norm_bias is None else layer.norm_bias.to(wide)
        return torch.stack((mean, variance, rstd, scale, shift))


def _expand(problem: Problem, count: Tensor, blocks: Blocks | None = None) -> tuple[Tensor, Tensor]:
    channels, hidden = problem.x.shape[2], problem.hidden_features
    if blocks is None:
        blocks = problem.tuned(
            "leff_expand_moments",
            expand_blocks(channels, hidden, problem.dtype, problem.chip),
            {"C": channels, "E": hidden, "norm": problem.norms[0]},
            lambda blocks: _expand(problem, torch.empty_like(count), blocks),
        )
    rows = cdiv(problem.tokens, blocks.sizes["BM"])
    moments = _Moments(problem, 0, rows, hidden)
    z1 = problem.empty(problem.tokens, hidden, dtype=problem.dtype)
    problem.launch(
        leff_expand_moments_kernel,
        (rows * cdiv(hidden, blocks.sizes["BE"]),),
        blocks,
        {
            "p_x": problem.x,
            "p_weight": problem.weight(0),
            "p_bias": problem.layers[0].bias,
            "p_z1": z1,
            **moments.arguments,
        },
    )
    return z1, moments.norm(count)


def _depthwise(problem: Problem, z1: Tensor, norm1: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    hidden, (_, width) = problem.hidden_features, problem.grid_size
    blocks = depthwise_blocks(width, hidden, problem.kernel_size, problem.dtype)
    columns, channels = cdiv(width, blocks.sizes["BW"]), cdiv(hidden, blocks.sizes["BE"])
    images = images_per_program(problem, columns * channels)
    parts = cdiv(problem.x.shape[0], images) * columns
    moments = _Moments(problem, 1, parts, hidden)
    z2 = torch.empty_like(z1)
    problem.launch(
        leff_depthwise_kernel,
        (parts * channels,),
        blocks,
        {
            "p_z1": z1,
            "p_norm1": norm1,
            "p_taps": problem.taps(),
            "p_bias": problem.layers[1].bias,
            "p_z2": z2,
            "IMAGES": images,
            "NORM": problem.norms[0] != "none",
            "ACTIVATION": problem.activations[0],
            **moments.arguments,
        },
    )
    return z2, moments.norm(count)


def _contract(
    problem: Problem,
    z2: Tensor,
    norm2: Tensor,
    out: Tensor,
    residual: Tensor | None,
    count: Tensor,
    blocks: Blocks | None = None,
) -> Tensor:
    """Into ``out``, which is z3 or, where it has prefix tokens, the result; returns the norm array."""
    outputs = problem.out_features
    if blocks is None:
        blocks = problem.tuned(
            "leff_contract_operand",
            contract_blocks(outputs, problem.dtype, problem.chip),
            {"E": problem.hidden_features, "O": outputs, "operand": "activation", "norm": problem.norms[2]},
            lambda blocks: _contract(
                problem, z2, norm2, torch.empty_like(out), residual, torch.empty_like(count), blocks
            ),
        )
    rows = cdiv(problem.tokens, blocks.sizes["BM"])
    moments = _Moments(problem, 2, rows, outputs)
    to_tokens = out.dim() == 3
    prefix = problem.num_prefix_tokens if to_tokens else 0
    problem.launch(
        leff_contract_operand_kernel,
        (
            (rows + (problem.prefix_blocks(blocks.sizes["BM"]) if to_tokens else 0))
            * cdiv(outputs, blocks.sizes["BO"] * blocks.sizes["NO"]),
        ),
        blocks,
        {
            "p_a": z2,
            "p_z": None,
            "p_rows": norm2,
            "p_weight": problem.weight(2),
            "p_bias": problem.layers[2].bias,
            "p_operand": None,
            "p_tokens": None,
            "p_mean": None,
            "p_tail": None,
            "p_out": out,
            "p_prefix": problem.x,
            "p_residual": residual,
            "P": prefix,
            "STRIDE_O": problem.hidden_features,
            "STRIDE_E": 1,
            "OPERAND": "activation",
            "NORM": problem.norms[1] != "none",
            "ACTIVATION": problem.activations[1],
            "KEEP_OPERAND": False,
            "HAS_TAIL": False,
            "HAS_RESIDUAL": residual is not None,
            **moments.arguments,
        },
    )
    return moments.norm(count)
