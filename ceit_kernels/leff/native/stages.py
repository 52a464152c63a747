"""The compiled pipelines' schemas."""

import torch

from ..arguments import ACTIVATIONS

__all__ = ["activation_index", "images_at_a_time", "stages"]

for _schema in (
    "_leff_infer(Tensor x, Tensor?[] parameters, Tensor? packed, Tensor? residual, float[] eps, int[] sizes, "
    "Tensor(a!) out) -> ()",
    "_leff_pack(Tensor like, Tensor?[] parameters, float[] eps, int[] sizes) -> Tensor",
    "_leff_train(Tensor x, Tensor?[] parameters, Tensor? residual, Tensor prefix, float[] eps, int[] modes, "
    "int[] sizes, str group, Tensor(a!) out) -> Tensor[]",
    "_leff_train_backward(Tensor dout, Tensor x, Tensor?[] parameters, Tensor[] saved, int[] modes, int[] sizes, "
    "str group, bool need_x, int needs) -> Tensor[]",
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
