"""The compiled stages' schemas."""

import torch

from ..arguments import ACTIVATIONS

__all__ = ["activation_index", "images_at_a_time", "stages"]

for _schema in (
    "_leff_depthwise(Tensor x, Tensor? norm, int first, Tensor taps, Tensor? bias, int second, int side, int height, "
    "int width, Tensor(a!) out, Tensor(b!)? moments) -> ()",
    "_leff_depthwise_backward(Tensor(a!) g, Tensor z2, Tensor? gradient2, Tensor taps, Tensor z1, Tensor? norm1, "
    "int first, int side, int height, int width, Tensor(b!)? sums1, Tensor(c!)? grad_taps) -> ()",
    "_leff_sums(Tensor g, Tensor? z, Tensor? norm, int tokens, Tensor(a!) sums) -> ()",
    "_leff_gradient(Tensor g, Tensor? z, Tensor? gradient, int tokens, Tensor(a!) out) -> ()",
    "_leff_finish(Tensor z, Tensor? norm, Tensor x, Tensor? residual, int tokens, Tensor(a!) out) -> ()",
    "_leff_norm_array(Tensor? moments, Tensor? counts, Tensor? running_mean, Tensor? running_var, Tensor? weight, "
    "Tensor? bias, float eps, Tensor(a!) out, Tensor(b!)? total) -> ()",
    "_leff_gradient_array(Tensor sums, Tensor? norm, Tensor? count, Tensor(a!)? vectors, Tensor(b!)? gradient) -> ()",
    "_leff_infer(Tensor x, Tensor prefix, Tensor weight1, Tensor bias1, Tensor taps, Tensor bias2, Tensor weight3, "
    "Tensor bias3, Tensor? residual, int first, int second, int height, int width, int images, Tensor(a!) out) -> ()",
    "_leff_expand(Tensor x, Tensor weight, Tensor? bias, int tokens, Tensor(a!)? moments) -> Tensor",
    "_leff_contract(Tensor z2, Tensor? norm, int activation, Tensor weight, Tensor? bias, int images, "
    "Tensor(a!)? moments) -> Tensor",
    "_leff_contract_backward(Tensor dz3, Tensor weight, Tensor z2, Tensor? norm, int activation, int images, "
    "bool need_weight, Tensor(a!) g2, Tensor(b!) sums) -> Tensor",
    "_leff_expand_backward(Tensor(a!) g1, Tensor z1, Tensor? gradient, Tensor x, Tensor weight, int tokens, "
    "int images, bool need_x, bool need_weight) -> (Tensor, Tensor)",
):
    torch.library.define(f"ceit::{_schema.partition('(')[0]}", f"({_schema.partition('(')[2]}")

stages = torch.ops.ceit


def activation_index(name: str) -> int:
    """What the stages call an activation."""
    return ACTIVATIONS.index(name)


def images_at_a_time(hidden_bytes: int, bytes_in_cache: int) -> int:
    """Images whose hidden tokens are worked on together.

    Args:
        hidden_bytes: of an image's hidden tokens.
        bytes_in_cache: of the hidden tokens that a thread works on at a time.
    """
    return max(1, torch.get_num_threads() * bytes_in_cache // max(hidden_bytes, 1))
