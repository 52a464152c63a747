"""Modules of a frozen model whose layers the compiled code knows: one call on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import backends
from ..adapters.chains import Chain, chain_of
from ..adapters.heads import head_of
from ..adapters.recipes import idle_options
from ..common.autocast import autocast_dtype
from ..common.calls import is_eager, unsupported_reason
from ..common.intact import Intact
from .layers import Steps, steps_of, whole_of
from .prepack import Prepacking
from .steps import Attention, ConvLayer, Norm, NotConvolutions, Size
from .units import fits

__all__ = ["FrozenConvnet"]

torch.library.define("ceit::_convnet_prepack", "(Tensor like, Tensor?[] parameters, int[] sizes) -> Tensor")
torch.library.define("ceit::_convnet_infer", "(Tensor x, Tensor prepacked, int[] sizes, bool planar) -> Tensor")
torch.library.define("ceit::_convnet_fetch", "(Tensor addresses) -> ()")


@dataclass(eq=False)
class _Prepacked:
    """What calls read: layers as the kernels take them, and whether the modules compute these.

    Attributes:
        tensor, sizes: of the kernels.
        steps: what the modules compute.
        dtype: of the input.
        operators: whose backends they follow.
        modules: the modules within.
        state: of all modules.
        addresses: of what the state is, see ``Intact.addresses``.
    """

    tensor: Tensor
    sizes: list[int]
    steps: Steps
    dtype: torch.dtype
    operators: tuple[str, ...]
    modules: list[nn.Module]
    state: Intact = field(init=False)
    addresses: Tensor = field(init=False)
    fitting: dict[Size, bool] = field(default_factory=dict)  # whether images of a size are computed

    def remember(self, module: nn.Module, method: str) -> None:
        """The modules compute it now, and so does the one that they are within, when a method of it is called."""
        self.state = Intact([module, *self.modules], method)
        self.state.remember()
        self.addresses = torch.tensor(self.state.addresses(), dtype=torch.int64, device="cpu")

    def is_intact(self) -> bool:
        """Whether nothing was done to the modules since."""
        torch.ops.ceit._convnet_fetch(self.addresses)
        return self.state.holds() and all(holds() for holds in self.steps.conditions)

    def serves(self, x: Tensor) -> bool:
        """Whether a call may read it: eager inference on images of the dtype."""
        of_tokens = self.steps.takes_tokens
        return (
            (x.dim() > 1 if of_tokens else x.dim() == 4)
            and x.shape[-1 if of_tokens else 1] == self.steps.inputs
            and x.dtype == self.dtype
            and x.device.type == "cpu"
            and x.numel() > 0
            and not torch.is_grad_enabled()
            and is_eager(x)
            and unsupported_reason(x) is None
            and autocast_dtype(x) is None
            and not _has_any_global_hook()
            and self.is_intact()
            and (of_tokens or self._fits((x.shape[2], x.shape[3])))
            and all(backends.choose(name, x, x.dtype).backend == "native" for name in self.operators)
        )

    def _fits(self, size: Size) -> bool:
        found = self.fitting.get(size)
        if found is None:
            found = self.fitting[size] = fits(self.steps.steps, size)
        return found

    def __call__(self, x: Tensor) -> Tensor:
        """The result, in memory as x is."""
        out = self._infer(x)
        return out.flatten(1) if self.steps.is_flat else out

    def _infer(self, x: Tensor) -> Tensor:
        if self.steps.takes_tokens:
            rows = x.shape[1:-1].numel() if x.dim() > 2 else x.shape[0]
            tokens = x.contiguous().view(-1, rows, 1, x.shape[-1])
            return torch.ops.ceit._convnet_infer(tokens, self.tensor, self.sizes, False).view(*x.shape[:-1], -1)
        planar = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
        images = x.contiguous() if planar else x.permute(0, 2, 3, 1)
        out = torch.ops.ceit._convnet_infer(images, self.tensor, self.sizes, planar)
        return out if planar else out.permute(0, 3, 1, 2)


class FrozenConvnet:
    """What is put before the class of a module in a frozen model whose children are convolutions one after another.

    ``_prepacked`` and ``_features`` belong to this processor: copies are of the class from before, and ``freeze`` makes
    them anew.

    Attributes:
        _prepacked: of ``forward``, or of the method that makes features where no more of a whole model is known.
        _features: of that method.
    """

    _prepacked: _Prepacked
    _features: _Prepacked

    def explanation(self) -> tuple[str, str]:
        """What runs a call, and why."""
        prepacked = self._intact()
        if prepacked is None:
            return "plain", "something was done to a part of it since it was frozen"
        what = "convolutions and attention" if "attention" in prepacked.operators else "convolutions"
        return "native", f"frozen; {what} one after another, in one call"

    def uncalled(self) -> list[nn.Module]:
        """The modules that are not called."""
        prepacked = self._intact()
        return [] if prepacked is None else prepacked.modules

    def _intact(self) -> _Prepacked | None:
        return next((made for made in (self._prepacked, self._features) if made.is_intact()), None)

    @staticmethod
    def freeze(module: nn.Module) -> Collection[str] | None:
        """Prepack a module in evaluation mode whose tensors do not change any more.

        Returns:
            The names of the children that are not called any more; None where the module is something else.
        """
        try:
            steps = steps_of(module)
        except NotConvolutions:
            return None
        weights = _weights(steps)
        layers = [step for step in steps.steps if not isinstance(step, Norm)]
        if len(layers) < 1 + steps.takes_tokens or any(weight.dtype != weights[0].dtype for weight in weights):
            return None  # a linear layer by itself is frozen as such
        for operator in _operators(steps):
            if backends.current_backend(operator) not in ("auto", "native"):
                return None
            if backends.choose(operator, weights[0], weights[0].dtype).backend != "native":
                return None
        chain = chain_of(module) or Chain(())
        whole = chain.method != "forward"
        called = [name for name in module._modules if not whole or name in chain.children]
        within = _parts(module, called)
        made = [_prepack(steps, weights[0], within)]
        head = head_of(module) if whole else None
        if head is not None:
            with suppress(NotConvolutions):
                all_steps = whole_of(steps, module, head)
                if all(weight.dtype == weights[0].dtype for weight in _weights(all_steps)):
                    called = [name for name in module._modules if name in chain.children + head.children]
                    made.append(_prepack(all_steps, weights[0], _parts(module, called)))
                    made[0].tensor = made[1].tensor[: len(made[0].tensor)]  # which begins with the same weights
        module.__dict__.update(_features=made[0], _prepacked=made[-1])
        for prepacked in made:
            prepacked.remember(module, chain.method)
        module.__class__ = _frozen_class(type(module), chain, len(made) > 1)
        return called

    def __reduce_ex__(self, protocol: Any) -> tuple:
        plain: Any = object.__new__(type(self).__bases__[-1])
        plain.__dict__.update((name, value) for name, value in self.__dict__.items() if name not in _MADE)
        make, arguments, *state = plain.__reduce_ex__(protocol)
        return _made, (make, *arguments), *state


_MADE = "_prepacked", "_features"


def _parts(module: nn.Module, children: Collection[str]) -> list[nn.Module]:
    """All modules within some children."""
    return [part for name in children for part in (module._modules[name] or nn.Identity()).modules()]


def _made(make: Callable, *arguments: Any) -> nn.Module:
    return make(*arguments)


def _frozen_class(found: type[nn.Module], chain: Chain, whole: bool) -> type:
    methods = {chain.method: _method(found, chain.method, "_features", chain.then)}
    if whole:
        methods["forward"] = _method(found, "forward", "_prepacked")
    name = f"Frozen{found.__name__.removeprefix('Fused')}"
    return type(name, (FrozenConvnet, found), {"__module__": found.__module__, **methods})


def _method(found: type[nn.Module], method: str, made: str, then: tuple[str, ...] = ()) -> Callable[..., Any]:
    idle = idle_options(found)

    def forward(self: Any, x: Any, *arguments: Any, **options: Any) -> Any:
        prepacked = self.__dict__[made]
        if not arguments and options.keys() <= idle and isinstance(x, Tensor) and prepacked.serves(x):
            out = prepacked(x)
            for name in then:
                out = self._modules[name](out)
            return out
        return getattr(found, method)(self, x, *arguments, **options)

    return forward


def _weights(steps: Steps) -> list[Tensor]:
    """All tensors that are of the model's dtype."""
    found: list[Tensor | None] = []
    for step in steps.steps:
        if isinstance(step, ConvLayer):
            found += [layer.weight for layer in (step, *(step.gate.layers if step.gate else ()))]
        elif isinstance(step, Norm):
            found += [step.weight, step.bias]
    return [tensor for tensor in found if tensor is not None]


def _operators(steps: Steps) -> tuple[str, ...]:
    """What its settings of backends are those of."""
    return ("leff", "attention") if any(isinstance(step, Attention) for step in steps.steps) else ("leff",)


def _prepack(steps: Steps, like: Tensor, modules: list[nn.Module]) -> _Prepacked:
    made = Prepacking(steps.steps)
    return _Prepacked(
        torch.ops.ceit._convnet_prepack(like, made.parameters, made.sizes),
        made.sizes,
        steps,
        like.dtype,
        _operators(steps),
        modules,
    )
