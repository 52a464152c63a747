"""Turning a plain module into a fused one over the same state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

__all__ = ["adopt"]

FusedModule = TypeVar("FusedModule", bound=nn.Module)


def adopt(
    fused_class: type[FusedModule],
    plain: nn.Module,
    attributes: Sequence[str],
    children: Mapping[str, type[nn.Module] | tuple[type[nn.Module], ...]],
) -> FusedModule:
    """A ``fused_class`` whose parameters, buffers, children and hooks are those of ``plain``, the same objects.

    Args:
        fused_class: the class of the result, whose constructor does not run.
        plain: the module that gives its state; it stays usable.
        attributes: plain attributes that ``fused_class`` reads.
        children: child modules whose parameters ``fused_class`` uses without calling them, with their exact types. A
            subclass may compute something else (an adapter, a quantised layer), which would be lost.

    Raises:
        TypeError: an attribute or a child is missing, or a child is of another type.
    """
    name = type(plain).__name__
    for attribute in attributes:
        if not hasattr(plain, attribute):
            raise TypeError(f"plain: {fused_class.__name__} needs the attribute {attribute!r}, {name} has none")
    for child, types in children.items():
        found = type(getattr(plain, child, None))
        allowed = types if isinstance(types, tuple) else (types,)
        if found not in allowed:
            expected = " or ".join(kind.__name__ for kind in allowed)
            raise TypeError(
                f"plain: {fused_class.__name__} needs {name}.{child} to be {expected}, got {found.__name__}"
            )
    fused = fused_class.__new__(fused_class)
    fused.__dict__.update(plain.__dict__)
    return fused
