"""Swapping the plain modules of a model for fused ones, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from .backends import OPERATORS

__all__ = ["fuse", "register_fusion", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)
FuseOne = Callable[[nn.Module], nn.Module]

_fusions: dict[type[nn.Module], tuple[str, FuseOne]] = {}
_PLAIN = "_plain_module"


def register_fusion(operator: str, plain_class: type[nn.Module], fuse_one: FuseOne) -> None:
    """Tell ``fuse`` how to replace the modules of a class.

    Args:
        operator: ``"leff"``, ``"lca"``, ``"i2t"``, ``"norm"``, ``"linear"`` or ``"attention"``, whose flag of ``fuse``
            covers the class.
        plain_class: the class; instances of a subclass, which may compute something else, are left alone.
        fuse_one: makes a fused module that shares the state of a plain one, such as ``FusedLeFF.from_plain``.

    Raises:
        ValueError: unknown operator.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator: expected one of {OPERATORS}, got {operator!r}")
    _fusions[plain_class] = (operator, fuse_one)


def fuse(
    model: Model,
    leff: bool = True,
    lca: bool = True,
    i2t: bool = True,
    norm: bool = True,
    linear: bool = True,
    attention: bool = True,
) -> Model:
    """Replace plain modules by fused ones that share their parameters, buffers and hooks, in place.

    Optimizers, state_dicts and later ``.to()`` calls go on as before. Call it before wrapping the model
    (DistributedDataParallel, ``torch.compile``).

    Args:
        model: any module; classes that a model package registered (``ceit`` does) are found at any depth.
        leff: fuse the locally-enhanced feed-forward blocks.
        lca: fuse the class-token attention across layers.
        i2t: fuse the image-to-tokens stem.
        norm: fuse the residual connections with the norms behind them.
        linear: let the linear layers take their products from oneDNN on the CPU.
        attention: fuse the self-attention of the encoder.

    Returns:
        The model; a fused module in its place if ``model`` itself is a plain one.

    Raises:
        TypeError: a plain module has been altered in a way that the fused one would not honour.
    """
    flags = (leff, lca, i2t, norm, linear, attention)
    wanted = {name for name, flag in zip(OPERATORS, flags, strict=True) if flag}

    def replacement(module: nn.Module) -> nn.Module:
        operator, fuse_one = _fusions.get(type(module), (None, None))
        if operator not in wanted:
            return module
        fused = fuse_one(module)
        # In a tuple, so that it is no child: not in the state_dict, not found twice by parameters().
        fused.__dict__[_PLAIN] = (module,)
        return fused

    return _replace(model, replacement)


def unfuse(model: Model) -> Model:
    """Put the plain modules back that ``fuse`` replaced, in place; parameters and buffers stay the same objects.

    Returns:
        The model; the plain module if ``model`` itself is a fused one.
    """

    def replacement(module: nn.Module) -> nn.Module:
        if _PLAIN not in module.__dict__:
            return module
        (plain,) = module.__dict__[_PLAIN]
        plain.training = module.training
        return plain

    return _replace(model, replacement)


def _replace(model: nn.Module, replacement: Callable[[nn.Module], nn.Module]) -> nn.Module:
    # All replacements are made before the first is put in place, so that an error leaves the model as it was.
    replaced = {module: replacement(module) for module in model.modules()}
    for module in list(replaced):
        for name, child in module.named_children():
            if replaced[child] is not child:
                setattr(module, name, replaced[child])
    return replaced[model]
