"""What makes a fused class of a plain one: a ``forward`` that computes the same by an operator of this package."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, ClassVar, TypeGuard, TypeVar, cast

from torch import nn

from .children import declare_methods, trust

__all__ = ["Fusion", "attributes_of", "is_made", "stand_in"]

Plain = TypeVar("Plain", bound=nn.Module)


def attributes_of(plain_class: type[Plain]) -> type[Plain]:
    """A second base of a fusion: the plain class for type checkers, which it is put before; ``object`` at run time."""
    return cast("type[Plain]", object)


class Fusion:
    """Base of what fused classes put before their plain class, ``class FusedX(XFusion, X)``.

    Nothing but the class tells a fused module from a plain one, so that ``module.__class__ = FusedX`` fuses and
    ``module.__class__ = X`` unfuses it: hooks, attributes, state and references stay what they are. A subclass defines
    ``forward`` with the arguments of the plain class's; where the operator cannot serve a call it returns
    ``super().forward(...)``. In TorchScript, which has no ``super``, it returns ``self._plain_forward(...)``.

    Attributes:
        plain_class: the class that a fused one is fused of; inherited by subclasses of a fused class.
        calls_children: whether ``forward`` calls all children; otherwise it reads their tensors.
    """

    plain_class: ClassVar[type[nn.Module]]
    calls_children: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        plain = cls.__bases__[-1]
        if issubclass(plain, nn.Module) and not issubclass(plain, Fusion):
            cls.plain_class = plain
            cls._plain_forward = _renamed(plain.forward, "_plain_forward")
        declare_methods(cls, like=getattr(cls, "plain_class", None))

    def plain_reason(self) -> str | None:
        """Why the module's children and settings leave it to its plain ``forward``, if they do."""
        raise NotImplementedError

    @classmethod
    def from_plain(cls, plain: nn.Module) -> nn.Module:
        """A fused module that has the parameters, buffers, children and hooks of a plain one, which stays as it is.

        Its class is a subclass of the plain one's, see ``register_fusion``.

        Raises:
            TypeError: the operator would not compute what the plain module does.
        """
        fused: Any = copy.copy(plain)
        fused.__class__ = stand_in(type(plain), cls)
        reason = fused.plain_reason()
        if reason is not None:
            raise TypeError(f"plain: {cls.__name__} cannot stand in for this {type(plain).__name__}: {reason}")
        return fused


def is_made(found: type) -> TypeGuard[type[Fusion]]:
    """Whether a class is a fused one, and not a subclass of it."""
    return issubclass(found, Fusion) and "plain_class" in vars(found)


@cache
def stand_in(plain_class: type[nn.Module], fused_class: type[Fusion]) -> type[Fusion]:
    """The fused class of a plain class: ``fused_class`` itself, or what makes it one put before another plain class.

    Args:
        plain_class: any class of modules.
        fused_class: a fused class, or what is put before the plain class to make one.

    Raises:
        TypeError: ``fused_class`` is neither.
    """
    if not (isinstance(fused_class, type) and issubclass(fused_class, Fusion) and hasattr(fused_class, "forward")):
        raise TypeError(f"fused_class: expected a fused class such as FusedLeFF, got {fused_class!r}")
    trust(plain_class)
    fusion: Any = fused_class
    if issubclass(fused_class, nn.Module):
        if not is_made(fused_class):
            raise TypeError(f"fused_class: expected a fused class such as FusedLeFF, got {fused_class!r}")
        if fused_class.plain_class is plain_class:
            return fused_class
        fusion = fused_class.__bases__[0]
    members: dict[str, Any] = {"__module__": plain_class.__module__, "__doc__": plain_class.__doc__}
    if list(inspect.signature(plain_class.forward).parameters) != list(inspect.signature(fusion.forward).parameters):
        members["forward"] = _forward_of_one_argument(plain_class, fusion)

    made: Any

    def reduce(self: nn.Module, protocol: int) -> tuple:
        # The class has no name to be found by.
        make, (_, *arguments), *state = super(made, self).__reduce_ex__(protocol)
        return _remake, (plain_class, fused_class, make, *arguments), *state

    members["__reduce_ex__"] = reduce
    made = type(f"Fused{plain_class.__name__}", (fusion, plain_class), members)
    return made


def _remake(plain_class: type[nn.Module], fused_class: type[Fusion], make: Callable, *arguments: Any) -> nn.Module:
    return make(stand_in(plain_class, fused_class), *arguments)


def _forward_of_one_argument(plain_class: type[nn.Module], fusion: Any) -> Callable:
    """A ``forward`` that leaves calls with arguments that the operator may not know to the plain class."""

    def forward(self, *arguments, **options):
        if len(arguments) != 1 or options:
            return plain_class.forward(self, *arguments, **options)
        return fusion.forward(self, *arguments)

    return forward


def _renamed(function: Callable, name: str) -> Callable:
    """A copy under another name, which TorchScript compiles beside the function of the first one."""
    if not isinstance(function, FunctionType):
        return function
    copied = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copied.__kwdefaults__, copied.__annotations__ = function.__kwdefaults__, function.__annotations__
    return copied
