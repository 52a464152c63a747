"""Checks of an operator's arguments, with messages that say what was given and what is expected."""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import autocast_dtype

__all__ = [
    "check_device",
    "check_dtype",
    "check_floating",
    "check_input",
    "check_parameters",
    "check_shape",
    "norm_dtype_reason",
]


def check_shape(name: str, tensor: Tensor, *expected: int | str) -> None:
    """Every expected size is a number, or the name of a dimension of any size."""
    shape = tensor.shape
    if len(shape) == len(expected):
        for want, size in zip(expected, shape, strict=True):  # a loop takes half the time of all()
            if type(want) is not str and want != size:
                break
        else:
            return
    wanted = ", ".join(str(size) for size in expected)
    raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """The tensor holds real floating-point numbers."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def check_dtype(name: str, tensor: Tensor, expected: torch.dtype, why: str) -> None:
    """The tensor has the dtype that another argument asks for."""
    if tensor.dtype != expected:
        raise TypeError(f"{name}: expected {expected} like {why}, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """Two arguments are on one device."""
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} like {like_name}, got {tensor.device}")


def check_parameters(x: Tensor, compute_dtype: torch.dtype | None, **parameters: Tensor | None) -> None:
    """Parameters are on the device of x and, unless ``compute_dtype`` is given, of its dtype."""
    for name, parameter in parameters.items():
        if parameter is not None:
            check_device(name, parameter, x, "x")
            check_floating(name, parameter)
            if compute_dtype is None:
                check_dtype(name, parameter, x.dtype, "x")


def check_input(name: str, tensor: Tensor, like: Tensor, like_name: str, *expected: int | str) -> None:
    """A module's input has the expected shape and, unless autocast sees to it, the dtype of the module's weight."""
    check_shape(name, tensor, *expected)
    check_floating(name, tensor)
    check_device(name, tensor, like, like_name)
    if autocast_dtype(tensor) is None:
        check_dtype(name, tensor, like.dtype, like_name)


def norm_dtype_reason(name: str, dtype: torch.dtype, *tensors: Tensor | None) -> str | None:
    """Why plain PyTorch has no such norm of numbers in ``dtype``: its tensors are in that dtype, or all in float32."""
    found = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(found) < 2 and (not found or dtype in found or (torch.float32 in found and dtype.itemsize == 2)):
        return None
    given = " and ".join(sorted(str(kind) for kind in found))
    return f"{name} has tensors of {given} for numbers of {dtype}"
