"""What is fused in a model, what runs it here, and what was left plain and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import backends
from .common.calls import functions_reason
from .common.children import convolution_reason
from .common.freezing import Prepacked
from .common.module import Fusion
from .convnet import FrozenConvnet
from .fuse import fusion_of
from .leff.activations import MODULES
from .leff.arguments import kernel_size_unsupported_reason
from .operators import OPERATORS

__all__ = ["Explanation", "ModuleRow", "explain"]

_COLUMNS = ("module", "class", "operator", "runs by", "why")
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class ModuleRow:
    """What becomes of a module.

    Attributes:
        name: its path in the model.
        plain_class: the class that it is of, or that it was of before ``fuse``.
        operator: what computes it, or could; None where nothing is known to.
        fused: whether it has a fused class.
        backend: what runs a call here, "triton", "native" or "reference"; "plain" where its plain ``forward`` runs.
        reason: why, and why not another.
    """

    name: str
    plain_class: str
    operator: str | None
    fused: bool
    backend: str
    reason: str


class Explanation(list[ModuleRow]):
    """Rows of ``ModuleRow``; its text is a table with a line for modules that are alike."""

    def __str__(self) -> str:
        alike: dict[tuple[str, ...], list[str]] = {}
        for row in self:
            what = row.plain_class, row.operator or "-", row.backend, row.reason
            alike.setdefault(what, []).append(row.name or "(the model)")
        rows: list[tuple[str, ...]] = [_COLUMNS]
        for what, names in alike.items():
            rows.append((names[0] + (f" and {len(names) - 1} more" if names[1:] else ""), *what))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:4]
        return "\n".join("  ".join([*map(str.ljust, row, widths), row[4]]).rstrip() for row in rows)


def explain(model: nn.Module) -> Explanation:
    """Say of each module of a model by what operator it is fused, what runs it here, and why.

    Beside fused modules these have a row: modules that ``fuse`` knows and has left plain, and blocks with a depthwise
    convolution between pointwise layers that it does not know, with the part of them that no operator computes.

    Args:
        model: fused or not; nothing in it is changed or called.

    Returns:
        A list of ``ModuleRow`` in the order of ``named_modules``, which prints as a table.
    """
    like = next((tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()), None)
    like = torch.empty(0, device="cpu") if like is None else like
    depthwise = [name for name, module in model.named_modules() if _is_depthwise(module)]
    blocks = dict(_unknown_blocks(model, depthwise))
    rows = Explanation()
    read: set[nn.Module] = set()  # by a fused block, which does not call them
    for name, module in model.named_modules():
        if module in read:
            continue
        row = _row(name, module, like) or (name in blocks and _unknown_row(name, module, blocks[name])) or None
        if row is not None:
            rows.append(row)
            if row.operator == "leff" and row.backend not in ("plain", "reference"):
                read.update(module.uncalled() if isinstance(module, FrozenConvnet) else list(module.modules())[1:])
    return rows


def _row(name: str, module: nn.Module, like: Tensor) -> ModuleRow | None:
    """The row of a module that ``fuse`` knows."""
    kind = type(module)
    if isinstance(module, FrozenConvnet):
        found = kind.__bases__[-1]
        plain = found.plain_class if issubclass(found, Fusion) else found
        return ModuleRow(name, plain.__name__, "leff", True, *module.explanation())
    if isinstance(module, Fusion):
        operator = _operator_of(module)
        backend, reason = _choice(operator, module, like)
        reason = f"frozen; {reason}" if isinstance(module, Prepacked) else reason
        return ModuleRow(name, module.plain_class.__name__, operator, True, backend, reason)
    plain_class = kind.__bases__[0] if parametrize.is_parametrized(module) else kind
    operator, fused_class = fusion_of(plain_class)
    if fused_class is not None:
        if plain_class is not kind:
            reason = "parametrised: its tensors are computed at every use"
        elif "forward" in module.__dict__:
            reason = "it has a forward of its own"
        else:
            reason = "ceit_kernels.fuse has not been called, or was told to leave it"
        return ModuleRow(name, plain_class.__name__, operator, False, "plain", reason)
    for base in kind.__mro__[1:]:
        operator, fused_class = fusion_of(base) if issubclass(base, nn.Module) else ("", None)
        if fused_class is not None:
            reason = f"a subclass of {base.__name__}, which may compute something else"
            return ModuleRow(name, kind.__name__, operator, False, "plain", reason)
    return None


def _operator_of(module: Fusion) -> str:
    """Of a fused module, which may be of a class that was never registered."""
    found = (
        name
        for name, spec in OPERATORS.items()
        if any(isinstance(module, fused_class.__bases__[0]) for fused_class in spec.fused_classes())
    )
    return fusion_of(module.plain_class)[0] or next(found)


def _choice(operator: str, module: Any, like: Tensor) -> tuple[str, str]:
    reason = module.plain_reason() or functions_reason()
    if reason is not None:
        return "plain", reason
    tensor = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), like)
    try:
        choice = backends.choose(operator, tensor, tensor.dtype)
    except backends.BackendError as error:
        return "plain", str(error)
    others = backends.refusals(operator, tensor, tensor.dtype)
    return choice.backend, "; ".join([choice.reason, *(f"{other}: {why}" for other, why in others.items())])


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels and module.kernel_size != (1, 1)


def _is_pointwise(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _unknown_blocks(model: nn.Module, depthwise: list[str]) -> Iterator[tuple[str, str]]:
    """The smallest modules with pointwise layers before and behind the only depthwise convolution, and its name."""
    for convolution in depthwise:
        parent = convolution
        while parent:
            parent = parent.rpartition(".")[0]
            inside = [name for name in depthwise if not parent or name.startswith(f"{parent}.")]
            if len(inside) > 1:
                break
            leaves = list(_leaves(model.get_submodule(parent)))
            at = next(i for i, (_, leaf) in enumerate(leaves) if _is_depthwise(leaf))
            if any(_is_pointwise(m) for _, m in leaves[:at]) and any(_is_pointwise(m) for _, m in leaves[at:]):
                yield parent, convolution
                break


def _leaves(module: nn.Module) -> list[tuple[str, Any]]:
    layers = (*_NORMS, nn.Conv2d, nn.Linear)  # some have children, such as an activation
    return [(name, leaf) for name, leaf in module.named_modules() if not leaf._modules or isinstance(leaf, layers)]


def _unknown_row(name: str, block: nn.Module, convolution: str) -> ModuleRow:
    kind = type(block)
    reason = _structure_reason(block, convolution[len(name) + 1 if name else 0 :])
    if reason is None:
        reason = f"no adapter is known for {kind.__module__}.{kind.__qualname__}; register_fusion adds one"
    return ModuleRow(name, kind.__name__, "leff", False, "plain", reason)


def _structure_reason(block: nn.Module, convolution: str) -> str | None:
    """What the operator has not, in a block that has a depthwise convolution between pointwise layers."""
    for path, module in block.named_modules():
        kind = type(module).__name__.lower()
        if path and ("squeezeexcit" in kind or kind.endswith("semodule") or isinstance(module, nn.AdaptiveAvgPool2d)):
            return f"the kernels have no gate of pooled channels (squeeze-and-excitation), as {path} is"
    leaves = _leaves(block)
    at = next(i for i, (path, _) in enumerate(leaves) if path == convolution)
    depthwise = leaves[at][1]
    side = depthwise.kernel_size[-1]
    reason = convolution_reason(
        convolution, depthwise, (1, 1), (side // 2, side // 2), depthwise.in_channels
    ) or kernel_size_unsupported_reason(depthwise.weight)
    if reason is not None:
        return reason
    first = max(i for i, (_, leaf) in enumerate(leaves[:at]) if _is_pointwise(leaf))
    last = next(i for i, (_, leaf) in enumerate(leaves) if i > at and _is_pointwise(leaf))
    for path, leaf in (leaves[first], leaves[last]):
        hook = _tampering(leaf)
        if hook is not None:
            return f"{path} {hook}"
    width = leaves[last][1].weight.shape[1]
    if width != depthwise.out_channels:
        return f"{leaves[last][0]} takes {width} of {depthwise.out_channels} channels: a gate, which the kernels lack"
    for begin, end in ((first, at), (at, last)):
        between = leaves[begin + 1 : end]
        for i, (path, leaf) in enumerate(between):
            if isinstance(leaf, _NORMS) and not isinstance(leaf, nn.BatchNorm2d | nn.SyncBatchNorm):
                return f"the kernels have no {type(leaf).__name__}, as {path} is"
            if isinstance(leaf, _NORMS) and any(
                type(m) in MODULES and type(m) is not nn.Identity for _, m in between[:i]
            ):
                return f"the kernels have norms ahead of activations, and {path} is behind one"
    return None


def _tampering(layer: nn.Module) -> str | None:
    if parametrize.is_parametrized(layer):
        return "is parametrised"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "has a hook"
    return None
