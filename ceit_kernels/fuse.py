"""Turning the plain modules of a model into fused ones, and back, by their class."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.utils import parametrize

from .adapters import adapter_of
from .common.arguments import names_its_arguments
from .common.module import Fusion, is_made, stand_in
from .operators import OPERATORS

__all__ = ["fuse", "fuse_modules", "fusion_of", "register_fusion", "unfuse", "warn_of_nothing"]

Model = TypeVar("Model", bound=nn.Module)
_log = logging.getLogger("ceit_kernels")

# By the plain class.
_fusions: dict[type[nn.Module], tuple[str, Any]] = {
    fused_class.plain_class: (name, fused_class)
    for name, spec in OPERATORS.items()
    for fused_class in spec.fused_classes()
}


def register_fusion(operator: str, plain_class: type[nn.Module], fused_class: type[Fusion]) -> None:
    """Tell ``fuse`` which of your classes computes what an operator does.

    Its fused class is made of both: a subclass of yours with the ``forward`` of ``fused_class``, which runs yours where
    the operator cannot serve a call, and wherever your module has children, parameters or arguments that the operator
    does not know.

    Args:
        operator: ``"leff"``, ``"lca"``, ``"i2t"``, ``"add_norm"``, ``"linear"`` or ``"attention"``, whose flag of
            ``fuse`` covers the class.
        plain_class: the class, with the attributes and children that the plain class of ``fused_class`` has; instances
            of a subclass, which may compute something else, are left alone.
        fused_class: ``FusedLeFF`` or another of this package; or a subclass of ``adapters.BlockFusion`` that says where
            your class has the parts of LeFF.

    Raises:
        ValueError: unknown operator.
        TypeError: ``fused_class`` is no fused class.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator: expected one of {tuple(OPERATORS)}, got {operator!r}")
    _fusions[plain_class] = (operator, stand_in(plain_class, fused_class))


@names_its_arguments
def fuse(model: Model, **operators: bool) -> Model:
    """Turn the plain modules of a model into fused ones, in place, by their class alone.

    Every module stays the object that it is, with its parameters, hooks and attributes, and an instance of its plain
    class. What a fused module's operator does not compute, then or later (an adapter in the place of a child, a hook of
    it, other settings), runs by the plain class's ``forward``. Left plain are instances of subclasses, parametrised
    modules, and those with a ``forward`` of their own.

    Args:
        model: any module; found at any depth are the plain classes of this package, ``nn.Linear``, classes of timm and
            transformers that ``adapters`` lists, and those of ``register_fusion``. Which they are does not depend on
            what is imported.
        operators: False by the name of an operator leaves its modules plain: ``leff``, ``lca``, ``i2t``, ``add_norm``,
            ``linear`` (with the projection of patches) or ``attention``.

    Returns:
        The model. The logger "ceit_kernels" counts what was fused, as information, or warns that nothing was;
        ``explain`` says why.

    Raises:
        TypeError: unknown operator.
    """
    unknown = operators.keys() - OPERATORS.keys()
    if unknown:
        raise TypeError(f"fuse: expected operators of {tuple(OPERATORS)}, got {sorted(unknown)}")
    name = type(model).__name__  # the plain one
    found = fuse_modules(model, operators)
    if found:
        _log.info("fused modules of %s: %s", name, dict(found))
    elif not any(isinstance(module, Fusion) for module in model.modules()):
        warn_of_nothing(model)
    return model


def fuse_modules(model: nn.Module, operators: Mapping[str, bool] = MappingProxyType({})) -> Counter[str]:
    """What ``fuse`` does, without a word: how many modules there were of each operator."""
    found: Counter[str] = Counter()
    for module in model.modules():
        operator, fused_class = fusion_of(type(module))
        if fused_class is not None and operators.get(operator, True) and "forward" not in module.__dict__:
            cast("Any", module).__class__ = fused_class
            found[operator] += 1
    return found


def warn_of_nothing(model: nn.Module) -> None:
    """Say that no module was fused."""
    _log.warning("no module of %s was fused; ceit_kernels.explain(model) says why", type(model).__name__)


def fusion_of(plain_class: type[nn.Module]) -> tuple[str, type[Fusion] | None]:
    """The operator and the fused class of exactly this class: one of this package, a registered or a known one."""
    found = _fusions.get(plain_class)
    if found is None:
        adapter = adapter_of(plain_class)
        found = ("", None) if adapter is None else (adapter.operator, adapter.fused_class(plain_class))
    return found


@names_its_arguments
def unfuse(model: Model) -> Model:
    """Turn fused modules into plain ones, in place: what ``fuse`` did, backwards, with their present state.

    A module whose ``forward`` was replaced since, by one that may call the fused one, stays as it is.

    Returns:
        The model.
    """
    for module in model.modules():
        if "forward" not in module.__dict__:
            module.__class__ = _plain_class(module)
    return model


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module that is not fused; that of ``module`` itself where it is none that ``fuse`` makes."""
    found = type(module)
    if parametrize.is_parametrized(module) and is_made(found.__bases__[0]):
        # PyTorch has put a class of its own before the fused one.
        members = {name: value for name, value in vars(found).items() if name not in ("__dict__", "__weakref__")}
        plain = found.__bases__[0].plain_class
        return type(f"Parametrized{plain.__name__}", (plain,), members)
    return found.plain_class if is_made(found) else found
