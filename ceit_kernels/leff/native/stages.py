"""The compiled pipelines' schemas."""

import torch

from ..arguments import ACTIVATIONS

__all__ = ["activation_index", "stages"]

for _schema in (
    "_leff_infer(Tensor x, Tensor?[] parameters, Tensor? prepacked, Tensor? residual, float[] eps, int[] sizes, "
    "Tensor(a!) out) -> ()",
    "_leff_prepack(Tensor like, Tensor?[] parameters, float[] eps, int[] sizes) -> Tensor",
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
