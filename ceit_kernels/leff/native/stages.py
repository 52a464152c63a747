"""The compiled stages' schemas."""

import torch

from ..arguments import ACTIVATIONS

__all__ = ["activation_index", "bytes_in_cache", "stages"]

# Of the hidden tokens that a thread works on at a time.
bytes_in_cache = 2 << 20

for _schema in (
    "_leff_depthwise(Tensor x, Tensor? norm, int first, Tensor taps, Tensor? bias, int second, int side, int height, "
    "int width, Tensor(a!) out, Tensor(b!)? moments) -> ()",
    "_leff_depthwise_backward(Tensor g2, Tensor z2, Tensor? gradient2, Tensor taps, Tensor z1, Tensor? norm1, "
    "int first, int side, int height, int width, Tensor(a!) g1, Tensor(b!)? sums1, Tensor(c!)? grad_taps) "
    "-> ()",
    "_leff_moments(Tensor x, int tokens, Tensor(a!) moments) -> ()",
    "_leff_activate(Tensor x, Tensor? norm, int activation, int tokens, Tensor(a!) out) -> ()",
    "_leff_activate_backward(Tensor(a!) g, Tensor z, Tensor? norm, int activation, int tokens, Tensor(b!)? out, "
    "Tensor(c!) sums) -> ()",
    "_leff_sums(Tensor g, Tensor? z, Tensor? norm, int tokens, Tensor(a!) sums) -> ()",
    "_leff_gradient(Tensor g, Tensor? z, Tensor? gradient, int tokens, Tensor(a!) out) -> ()",
    "_leff_finish(Tensor z, Tensor? norm, Tensor x, Tensor? residual, int tokens, Tensor(a!) out) -> ()",
):
    torch.library.define(f"ceit::{_schema.partition('(')[0]}", f"({_schema.partition('(')[2]}")

stages = torch.ops.ceit


def activation_index(name: str) -> int:
    """What the stages call an activation."""
    return ACTIVATIONS.index(name)
