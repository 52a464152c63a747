"""Errors of public calls that name the argument which is not of its kind; a call that succeeds pays nothing for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from numbers import Real
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from torch import Tensor

__all__ = ["check_at_least", "check_probability", "names_its_arguments"]

Function = TypeVar("Function", bound=Callable[..., Any])

_WORDS = {Tensor: "a tensor", int: "an integer", float: "a number", bool: "True or False", str: "a string"}


def names_its_arguments(function: Function) -> Function:
    """Let a call that fails say which argument is not what its annotation says, if one is not.

    Raises:
        TypeError: in the place of what the call raised, naming the argument, what was given and what is expected.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            message = _complaint(function, args, kwargs)
            if message is None or str(error).startswith(message.partition(" ")[0]):
                raise
            raise TypeError(message) from error

    return call  # pyright: ignore[reportReturnType]


def check_at_least(least: int, **sizes: int | None) -> None:
    """Raise for the first integer that is smaller, or none; None is not asked."""
    for name, size in sizes.items():
        if size is None:
            continue
        if not _is_kind(size, int):
            raise TypeError(f"{name}: expected an integer, got {size!r}")
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}")


def check_probability(**rates: float) -> None:
    """Raise for the first number that is no probability."""
    for name, rate in rates.items():
        if not _is_kind(rate, float):
            raise TypeError(f"{name}: expected a probability, got {rate!r}")
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"{name}: expected a probability in [0, 1], got {rate}")


def _complaint(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What is to be said of the first argument that is not of its kind."""
    try:
        signature = inspect.signature(function, eval_str=True)
        given = signature.bind(*args, **kwargs).arguments
    except (NameError, TypeError):  # which Python's own message tells
        return None
    for name, value in given.items():
        parameter = signature.parameters[name]
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if not _is_kind(value, parameter.annotation):
            words = " or ".join(map(_words, _choices(parameter.annotation)))
            return f"{name}: expected {words}, got {value!r:.60}"
    return None


def _choices(kind: Any) -> tuple[Any, ...]:
    kind = kind.__bound__ if isinstance(kind, TypeVar) else kind
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _is_kind(value: Any, kind: Any) -> bool:
    kind, *others = _choices(kind)
    if others:
        return any(_is_kind(value, choice) for choice in (kind, *others))
    if kind is None or kind is NoneType:
        return value is None
    if kind is int:
        return hasattr(value, "__index__") and not isinstance(value, (bool, Tensor))
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    origin = get_origin(kind)
    if origin is Callable:
        return callable(value)
    if isinstance(origin, type):
        elements = [each for each in get_args(kind) if each is not ...]
        if not isinstance(value, origin) or isinstance(value, str):
            return False
        if origin is tuple and get_args(kind)[-1:] != (...,):
            return len(value) == len(elements) and all(map(_is_kind, value, elements))
        return len(elements) != 1 or all(_is_kind(each, elements[0]) for each in value)
    return not isinstance(kind, type) or kind is inspect.Parameter.empty or isinstance(value, kind)


def _words(kind: Any) -> str:
    if kind is None or kind is NoneType:
        return "None"
    return _WORDS.get(kind) or (f"a {kind.__name__}" if isinstance(kind, type) and not get_origin(kind) else str(kind))
