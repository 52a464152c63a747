"""LeFF's training on the CPU, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.products import transposed
from ..problem import Forward, Needs, Problem
from .norms import gradient_array, norm_array
from .stages import activation_index, images_at_a_time, stages

__all__ = ["leff_backward_native", "leff_forward_native"]

# Of hidden tokens for each thread. They come from memory and go there, so what counts is that the products are large.
bytes_in_cache = 4 << 20


def _images(problem: Problem) -> int:
    """How many images are worked on together, so that their hidden tokens stay in cache."""
    hidden_bytes = problem.tokens // problem.x.shape[0] * problem.hidden_features * problem.dtype.itemsize
    return images_at_a_time(hidden_bytes, bytes_in_cache)


def _rows(tensor: Tensor) -> Tensor:
    """The matrix whose rows are the tokens of a (B, rows, channels) tensor."""
    return tensor.view(-1, tensor.shape[-1])


def _array(norm: Tensor) -> Tensor | None:
    """A saved norm array, which has no element where there is no norm."""
    return norm if norm.numel() else None


def leff_forward_native(problem: Problem, residual: Tensor | None, out_dtype: torch.dtype) -> Forward:
    """The registered operator's results. x and residual contiguous, B at least 1."""
    (batch, rows, _), hidden, outputs = problem.x.shape, problem.hidden_features, problem.out_features
    tokens, count = problem.tokens // batch, problem.empty(1 if "batch" in problem.norms else 0)
    first, second = (activation_index(name) for name in problem.activations)

    def moments(layer: int, channels: int) -> Tensor | None:
        return problem.empty(batch, 2, channels) if problem.norms[layer] == "batch" else None

    x = problem.x.to(problem.dtype)
    moments1, moments2, moments3 = moments(0, hidden), moments(1, hidden), moments(2, outputs)
    z1 = stages._leff_expand(x, problem.weight(0), problem.bias(0), tokens, moments1)
    norm1 = norm_array(problem, 0, moments1, count)

    z2 = problem.empty(batch, tokens, hidden, dtype=problem.dtype)
    bias2 = problem.layers[1].bias
    bias2 = None if bias2 is None else bias2.to(problem.wide)
    identity, side = activation_index("identity"), problem.kernel_size
    stages._leff_depthwise(z1, norm1, first, problem.taps(), bias2, identity, side, *problem.grid_size, z2, moments2)
    norm2 = norm_array(problem, 1, moments2, count)

    z3 = stages._leff_contract(z2, norm2, second, problem.weight(2), problem.bias(2), _images(problem), moments3)
    norm3 = norm_array(problem, 2, moments3, count)

    out = problem.empty(batch, rows, outputs, dtype=out_dtype)
    prefix = problem.x.to(out_dtype) if problem.num_prefix_tokens else problem.x
    stages._leff_finish(z3, norm3, prefix, None if residual is None else residual.to(out_dtype), tokens, out)
    if norm3 is None:
        z3 = problem.empty(0, dtype=problem.dtype)
    norms = (problem.empty(0) if norm is None else norm for norm in (norm1, norm2, norm3))
    return Forward(out, _rows(z1), _rows(z2), _rows(z3) if z3.dim() == 3 else z3, *norms, count)


def leff_backward_native(
    problem: Problem, saved: Forward, dout: Tensor, need_x: bool, needs: Sequence[Needs]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of x, and those of weight, bias, norm weight and norm bias of each layer; None where not wanted.

    Args:
        problem: of the forward pass.
        saved: what it returned.
        dout: gradient of the result, contiguous.
        need_x: whether the gradient of x is wanted.
        needs: the gradients that are wanted of each layer.
    """
    return _Backward(problem, saved, dout, need_x, needs).run()


class _Backward:
    def __init__(self, problem: Problem, saved: Forward, dout: Tensor, need_x: bool, needs: Sequence[Needs]) -> None:
        batch = problem.x.shape[0]
        self.problem, self.needs, self.count = problem, needs, saved.count
        self.prefix_gradient = dout[:, : problem.num_prefix_tokens]
        self.dout, self.tokens = dout.to(problem.dtype), problem.tokens // batch
        self.z1, self.z2 = (z.view(batch, -1, problem.hidden_features) for z in (saved.z1, saved.z2))
        self.z3 = saved.z3.view(batch, -1, problem.out_features) if saved.z3.numel() else None
        self.norms = [_array(norm) for norm in (saved.norm1, saved.norm2, saved.norm3)]
        self.need_x, self.images = need_x, _images(problem)
        self.below1 = need_x or needs[0].weight
        self.below2 = need_x or any(needs[0]) or needs[1].weight
        self.below3 = self.below2 or any(needs[1])
        self.gradients: list[list[Tensor | None]] = [[None] * 4 for _ in needs]

    def run(self) -> tuple[Tensor | None, list[Tensor | None]]:
        dx = None
        dz3 = self._last_layer()
        if dz3 is not None:
            g2, gradient2 = self._contraction(dz3)
            if self.below2:
                g1, gradient1 = self._depthwise(g2, gradient2)
                if self.below1:
                    dx = self._first_layer(g1, gradient1)
        return dx, [gradient for layer in self.gradients for gradient in layer]

    def _sums(self, channels: int) -> Tensor:
        return self.problem.empty(self.problem.x.shape[0], 2, channels)

    def _coefficients(self, layer: int, sums: Tensor) -> Tensor | None:
        """The layer's gradient array; leaves the gradients of its vectors behind that are wanted."""
        gradient, vectors = gradient_array(self.problem, layer, sums, self.norms[layer], self.count)
        _, bias, norm_weight, norm_bias, _, _ = self.problem.layers[layer]
        targets = zip(self.needs[layer][1:], (bias, norm_weight, norm_bias), vectors, strict=True)
        self.gradients[layer][1:] = [vector.to(like.dtype) if need else None for need, like, vector in targets]
        return gradient

    def _weight(self, layer: int, gradient: Tensor) -> None:
        weight = self.problem.layers[layer].weight
        self.gradients[layer][0] = gradient.to(weight.dtype).view(weight.shape)

    def _last_layer(self) -> Tensor | None:
        """The gradient of z3, if anything below the last norm needs it."""
        problem, channels = self.problem, self.problem.out_features
        wanted = self.below3 or self.needs[2].weight
        gradient = None
        if self.needs[2].sums or (wanted and self.norms[2] is not None):
            sums = self._sums(channels)
            stages._leff_sums(self.dout, self.z3, self.norms[2], self.tokens, sums)
            gradient = self._coefficients(2, sums)
        if not wanted:
            return None
        dz3 = problem.empty(problem.x.shape[0], self.tokens, channels, dtype=problem.dtype)
        stages._leff_gradient(self.dout, self.z3, gradient, self.tokens, dz3)
        return dz3

    def _contraction(self, dz3: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient of the second norm's result, and that norm's gradient array."""
        problem, need_weight = self.problem, self.needs[2].weight
        # In a tensor with rows for prefix tokens, for the gradient of the first norm's result takes its place.
        sums, g2 = self._sums(problem.hidden_features), torch.empty_like(self.z1)
        dweight = stages._leff_contract_backward(
            dz3, problem.weight(2), self.z2, self.norms[1], activation_index(problem.activations[1]), self.images,
            need_weight, g2, sums,
        )  # fmt: skip
        if need_weight:
            self._weight(2, dweight)
        wanted = self.below2 or self.needs[1].sums
        return g2, self._coefficients(1, sums) if wanted else None

    def _depthwise(self, g2: Tensor, gradient2: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gradient of the first norm's result, in the place of ``g2``, and that norm's gradient array."""
        problem, taps = self.problem, self.problem.taps()
        need_weight = self.needs[1].weight
        sums = self._sums(problem.hidden_features)
        dtaps = problem.empty(problem.x.shape[0], *taps.shape) if need_weight else None
        first, where = activation_index(problem.activations[0]), (problem.kernel_size, *problem.grid_size)
        stages._leff_depthwise_backward(
            g2, self.z2, gradient2, taps, self.z1, self.norms[0], first, *where, sums, dtaps
        )
        if need_weight:
            self._weight(1, transposed(dtaps.sum(0)))
        wanted = self.below1 or self.needs[0].sums
        return g2, self._coefficients(0, sums) if wanted else None

    def _first_layer(self, g1: Tensor, gradient1: Tensor | None) -> Tensor | None:
        """The gradient of x. Overwrites ``g1``."""
        problem, need_weight = self.problem, self.needs[0].weight
        x, weight = problem.x.to(problem.dtype), problem.weight(0)
        dx, dweight = stages._leff_expand_backward(
            g1, self.z1, gradient1, x, weight, self.tokens, self.images, self.need_x, need_weight
        )
        if need_weight:
            self._weight(0, dweight)
        if not self.need_x:
            return None
        dx = dx.to(problem.x.dtype)
        if problem.num_prefix_tokens:
            dx[:, : problem.num_prefix_tokens] = self.prefix_gradient
        return dx
