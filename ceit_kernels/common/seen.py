"""Kinds of calls that were seen before: what is known of one, if the next has tensors of the same kind.

Asking each tensor of a call for its type, dtype, device, shape and strides takes Python longer than a launch. PyTorch's
compiler has a function that compares all of these for all tensors at once, in C++; without it no call is known.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Seen"]

Known = TypeVar("Known")

_guards: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)

_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_KINDS, _ALIKE = 1024, 4  # keys, and kinds of tensors for each


class Seen(Generic[Known]):
    """What is known of kinds of calls. It holds no tensor.

    A kind is a key and, of every tensor: whether it is there, its exact type, dtype, device, shape, strides, whether it
    needs a gradient, and its dispatch keys as this thread has them, which tell of autocast, of transforms that vmap or
    differentiate it, and of inference tensors. Dual tensors look like others. No call with a tensor twice is known.
    """

    def __init__(self) -> None:
        self._kinds: dict[Hashable, list[tuple[list[int], list[int], Callable[..., bool], Known]]] = {}

    def find(self, key: Hashable, tensors: Sequence[Tensor | None]) -> Known | None:
        """What was kept of a call with this key and such tensors; None if there was none."""
        for present, absent, check, known in self._kinds.get(key, ()):
            if check(*[tensors[i] for i in present]):
                for i in absent:
                    if tensors[i] is not None:
                        break
                else:
                    return known
        return None

    def keep(self, key: Hashable, tensors: Sequence[Tensor | None], known: Known) -> None:
        """Keep what is known of a call without subclasses of tensors; of many that share a key, of the first few."""
        kinds = self._kinds.get(key, ())
        there = [tensor for tensor in tensors if tensor is not None]
        # PyTorch calls the comparison its own affair, so whatever is wrong with it, the call is checked again.
        comparable = len(set(map(id, there))) == len(there) and all(type(tensor) in _PLAIN_TENSORS for tensor in there)
        if _guards is None or len(kinds) >= _ALIKE or not comparable:
            return
        present = [i for i, tensor in enumerate(tensors) if tensor is not None]
        absent = [i for i, tensor in enumerate(tensors) if tensor is None]
        sizes, strides = [list(tensor.shape) for tensor in there], [list(tensor.stride()) for tensor in there]
        try:
            check = _guards(*there, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        except (TypeError, ValueError, RuntimeError):
            return
        while len(self._kinds) >= _KINDS:
            self._kinds.pop(next(iter(self._kinds)), None)
        self._kinds[key] = [*kinds, (present, absent, check, known)]
