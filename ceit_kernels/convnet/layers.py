"""What a module computes, as a list of convolutions with what follows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.chains import Chain, chain_of
from ..common.children import child_reason, held, qualified_name
from ..leff.activations import MODULES, activation_name
from ..leff.norms import of_module
from ..linear.module import LINEAR

__all__ = ["ConvLayer", "NotConvolutions", "Unit", "layers_of", "units_of"]

_BATCH_NORM_ACT = "timm.layers.norm_act.BatchNormAct2d"
_LAYER_SCALES = "timm.layers.layer_scale.LayerScale2d", "timm.layers.layer_scale.LayerScale"  # images', tokens'
# Which do nothing in evaluation mode.
_IDLE = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    "timm.layers.drop.DropPath",
    "torchvision.ops.stochastic_depth.StochasticDepth",
)
_SIGMOIDS = nn.Sigmoid, "timm.layers.activations.Sigmoid"
_HARDSIGMOIDS = nn.Hardsigmoid, "timm.layers.activations.HardSigmoid"
_DEPTHWISE_SIDES = 3, 5, 7


class NotConvolutions(Exception):
    """A module is something else than convolutions one after another; the text says what."""


@dataclass(frozen=True)
class ConvLayer:
    """``after(activation(convolution(x) * scale + shift) + added)``.

    Attributes:
        weight: (outputs, inputs, side, side), or (channels, 1, side, side) where it is depthwise.
        scale, shift: (outputs,), of the convolution's bias and the norms behind it.
        stride, padding: of the convolution.
        is_depthwise: whether each channel has a kernel of its own.
        activation: a name.
        added: the index of the layer whose input is added; None where nothing is.
        after: the activation behind that.
        gate: multiplies the input of a pointwise layer; None where nothing does.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    stride: int
    padding: int
    is_depthwise: bool
    activation: str = "identity"
    added: int | None = None
    after: str = "identity"
    gate: Gate | None = None

    @property
    def side(self) -> int:
        """Of the kernel."""
        return self.weight.shape[-1]

    @property
    def inputs(self) -> int:
        """Channels that it takes."""
        return self.weight.shape[0 if self.is_depthwise else 1]

    @property
    def keeps_size(self) -> bool:
        """Whether the result has as many pixels as the input."""
        return self.stride == 1 and 2 * self.padding == self.side - 1

    @property
    def is_pointwise(self) -> bool:
        """Whether it computes each pixel by itself."""
        return (self.side, self.stride, self.padding) == (1, 1, 0)


@dataclass(frozen=True)
class Gate:
    """Squeeze-and-excitation: what two linear layers make of the mean over all pixels, behind a sigmoid.

    Attributes:
        layers: the one that reduces the channels, and the one that gives as many as there were.
        hard: whether the sigmoid is a hardsigmoid.
    """

    layers: tuple[ConvLayer, ConvLayer]
    hard: bool


def layers_of(module: nn.Module) -> tuple[list[ConvLayer], bool]:
    """The layers of a module in evaluation mode, behind the children that it calls ahead of them.

    Returns:
        The layers, and whether channels are the last dimension (linear layers of tokens), not the second (images).

    Raises:
        NotConvolutions: it has others, or something was done to it that calls of its parts would show.
    """
    found = _Layers()
    found.call("the module", module)
    if found.gate is not None:
        raise NotConvolutions("the module ends with a gate")
    return found.layers, bool(found.of_tokens)


class _Layers:
    """The layers of what was called so far."""

    def __init__(self) -> None:
        self.layers: list[ConvLayer] = []
        self.of_tokens: bool | None = None  # whether channels are the last dimension
        self.read = 0  # results of layers before this one are read by others than the next layer
        self.gate: Gate | None = None  # which multiplies what the layers give

    def call(self, name: str, module: nn.Module) -> None:
        kind = type(module)
        reason = child_reason(name, module, (kind,))
        if reason is not None:
            raise NotConvolutions(reason)
        if kind is nn.Conv2d or kind in LINEAR:
            self._append(name, _convolution(name, module) if kind is nn.Conv2d else _linear(module), kind in LINEAR)
        elif child_reason(name, module, _IDLE) is None:
            pass
        elif not self.of_tokens and (kind is nn.BatchNorm2d or qualified_name(kind) == _BATCH_NORM_ACT):
            self._norm(name, module)
            for child in module._modules:
                self.call(f"{name}.{child}", module._modules[child] or nn.Identity())
        elif qualified_name(kind) == _LAYER_SCALES[bool(self.of_tokens)]:
            gamma = _exact(held(module, "gamma"))
            self._multiply_add(name, gamma, torch.zeros_like(gamma))
        elif child_reason(name, module, MODULES) is None and activation_name(module) is not None:
            self._activate(name, str(activation_name(module)))
        else:
            self._chain(name, module)

    def _append(self, name: str, layer: ConvLayer, of_tokens: bool) -> None:
        if self.layers and (self.layers[-1].weight.shape[0], self.of_tokens) != (layer.inputs, of_tokens):
            raise NotConvolutions(f"{name} takes {layer.inputs} channels of other tensors than it gets")
        if self.gate is not None and not layer.is_pointwise:
            raise NotConvolutions(f"{name} follows a gate and is not pointwise")
        self.layers.append(replace(layer, gate=self.gate))
        self.of_tokens, self.gate = of_tokens, None

    def _chain(self, name: str, module: nn.Module) -> None:
        chain = chain_of(module)
        if chain is None:
            raise NotConvolutions(f"{name} is a {type(module).__name__}")
        state: dict[str, Any] = module._modules
        adds = chain.adds_input
        adds = getattr(module, adds) not in (None, False) if isinstance(adds, str) else adds
        called = (
            *chain.ahead,
            *chain.children,
            *(() if chain.drop_child is None else (chain.drop_child,)),
            *chain.behind,
            *filter(None, (chain.gate, chain.pool)),
        )
        for child, other in state.items():
            reason = chain.method == "forward" and other is not None and child not in called
            if reason and child_reason(child, other, _IDLE) is not None:
                raise NotConvolutions(f"{name} has {child}")
        own = [*module._parameters, *module._buffers]
        if own:
            raise NotConvolutions(f"{name} has {own[0]} of its own")
        if self.layers and any(state.get(child) is not None for child in chain.ahead):
            raise NotConvolutions(f"{name} begins with {chain.ahead[0]}")
        if chain.gate is not None:
            self._gate(name, module, chain)
            return
        first = len(self.layers)
        self.read = first if adds else self.read
        for children in (chain.children, chain.behind):
            for child in children:
                if state.get(child) is not None:
                    self.call(f"{name}.{child}", state[child])
            if adds and children is chain.children:
                drop_path = chain.drop_child and state.get(chain.drop_child)
                if drop_path:
                    self.call(f"{name}.{chain.drop_child}", drop_path)
                self._add(name, first)

    def _gate(self, name: str, module: Any, chain: Chain) -> None:
        within, children = _Layers(), module._modules
        for child in chain.children:
            within.call(f"{name}.{child}", children[child])
        reason = child_reason("the gate", children[chain.gate], _SIGMOIDS + _HARDSIGMOIDS)
        pool = children[chain.pool] if chain.pool else nn.AdaptiveAvgPool2d(1)
        reason = reason or child_reason("the pooling", pool, (nn.AdaptiveAvgPool2d,))
        if reason or pool.output_size not in (1, (1, 1)) or getattr(module, "add_maxpool", False):
            raise NotConvolutions(reason or f"{name} takes more than the mean of all pixels")
        if len(within.layers) != 2 or not all(layer.is_pointwise for layer in within.layers):
            raise NotConvolutions(f"{name} has other layers than two pointwise ones")
        reducing, expanding = within.layers
        channels = self._last(name).weight.shape[0]
        if not channels == reducing.inputs == expanding.weight.shape[0] or expanding.activation != "identity":
            raise NotConvolutions(f"{name} does not gate the {channels} channels that it gets")
        hard = child_reason("the gate", children[chain.gate], _HARDSIGMOIDS) is None
        self.gate = Gate((reducing, expanding), hard)

    def _last(self, name: str) -> ConvLayer:
        if self.gate is not None:
            raise NotConvolutions(f"{name} follows a gate")
        if len(self.layers) <= self.read:
            raise NotConvolutions(f"no convolution comes right before {name}")
        return self.layers[-1]

    def _norm(self, name: str, module: Any) -> None:
        norm = of_module(module)
        if norm is None or norm.training or norm.running_var is None:
            raise NotConvolutions(f"{name} takes statistics of the batch")
        scale = (_exact(norm.running_var) + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * _exact(norm.weight)
        shift = -_exact(norm.running_mean) * scale
        self._multiply_add(name, scale, shift if norm.bias is None else shift + _exact(norm.bias))

    def _multiply_add(self, name: str, scale: Tensor, shift: Tensor) -> None:
        layer = self._last(name)
        if layer.activation != "identity" or layer.added is not None:
            raise NotConvolutions(f"{name} follows an activation or a shortcut")
        self.layers[-1] = replace(layer, scale=layer.scale * scale, shift=layer.shift * scale + shift)

    def _activate(self, name: str, activation: str) -> None:
        layer = self._last(name)
        which = "activation" if layer.added is None else "after"
        if activation == "identity":
            return
        if getattr(layer, which) != "identity":
            raise NotConvolutions(f"{name} follows an activation")
        self.layers[-1] = replace(layer, **{which: activation})

    def _add(self, name: str, first: int) -> None:
        layer = self._last(name)
        if layer.added is not None or layer.is_depthwise:
            raise NotConvolutions(f"the shortcut of {name} ends behind another one or a depthwise convolution")
        around = self.layers[first:]
        if not all(each.keeps_size for each in around) or around[0].inputs != layer.weight.shape[0]:
            raise NotConvolutions(f"the shortcut of {name} has another shape than what it is added to")
        self.layers[-1] = replace(layer, added=first)


def _exact(tensor: Any) -> Tensor:
    return tensor.detach().double()


def _linear(module: Any) -> ConvLayer:
    weight, bias = held(module, "weight").detach(), held(module, "bias")
    shift = torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else _exact(bias)
    return ConvLayer(weight[:, :, None, None], torch.ones_like(shift), shift, 1, 0, False)


def _convolution(name: str, module: Any) -> ConvLayer:
    weight, bias = held(module, "weight"), held(module, "bias")
    outputs, (side, other_side) = weight.shape[0], weight.shape[2:]
    depthwise = 1 < module.groups == outputs == module.in_channels and side in _DEPTHWISE_SIDES
    (stride, stride_x), padding = module.stride, module.padding
    if module.groups != 1 and not (depthwise and stride in (1, 2)):
        raise NotConvolutions(f"{name} has groups={module.groups}, side {side} and stride {stride}")
    if side != other_side or stride != stride_x or isinstance(padding, str) or padding[0] != padding[1]:
        raise NotConvolutions(f"{name} is not the same in both directions")
    if tuple(module.dilation) != (1, 1) or module.padding_mode != "zeros":
        raise NotConvolutions(f"{name} has dilation={module.dilation}, padding_mode={module.padding_mode}")
    shift = torch.zeros(outputs, dtype=torch.float64) if bias is None else _exact(bias)
    return ConvLayer(weight.detach(), torch.ones_like(shift), shift, stride, padding[0], depthwise)


@dataclass(frozen=True)
class Unit:
    """Layers of which the compiled code needs no result but the last.

    Attributes:
        layers: a pointwise one, one that mixes neighbours and a pointwise one; None for those that are missing. One
            with a gate is by itself.
        added: what is added to the result: 0 nothing, 1 the input, 2 the input of the unit before.
    """

    layers: tuple[ConvLayer | None, ConvLayer | None, ConvLayer | None]
    added: int

    @property
    def after(self) -> str:
        """The activation behind what is added."""
        return next(layer.after for layer in reversed(self.layers) if layer is not None)


def units_of(layers: list[ConvLayer]) -> list[Unit]:
    """The layers in units.

    Raises:
        NotConvolutions: a shortcut goes around more than two units.
    """
    units: list[Unit] = []
    starts: list[int] = []
    for start, *roles in _groups(layers):
        starts.append(start)
        last = next(layer for layer in reversed(roles) if layer is not None)
        added = 0 if last.added is None else len(starts) - starts.index(last.added)
        if added > 2:
            raise NotConvolutions("a shortcut goes around more convolutions than one compiled call keeps")
        units.append(Unit((roles[0], roles[1], roles[2]), added))
    return units


def _groups(layers: list[ConvLayer]) -> Iterator[tuple[int, ConvLayer | None, ConvLayer | None, ConvLayer | None]]:
    """The first index and the layers of each unit."""
    begins = {layer.added for layer in layers}
    begins |= {i + 1 for i, layer in enumerate(layers) if layer.added is not None}
    begins |= {i for i, layer in enumerate(layers) if layer.gate is not None}
    at = 0
    while at < len(layers):
        end = next((i for i in range(at + 1, len(layers)) if i in begins), len(layers))
        if layers[at].gate is not None:
            yield at, None, None, layers[at]
            at += 1
            continue
        start = at
        roles: list[ConvLayer | None] = [None, None, None]
        mixes = [not layer.is_pointwise for layer in layers[at : min(end, at + 3)]]
        if (mixes[:2] == [False, True] and layers[at + 1].is_depthwise) or mixes in ([False, False], [False] * 3):
            roles[0], at = layers[at], at + 1
        if not layers[at].is_pointwise:
            roles[1], at = layers[at], at + 1
        # A pointwise layer ahead of a depthwise one belongs to that.
        expands = at + 1 < end and layers[at].is_pointwise and layers[at + 1].is_depthwise
        if at < end and layers[at].is_pointwise and not (expands and at > start and roles[0] is None):
            roles[2], at = layers[at], at + 1
        yield start, roles[0], roles[1], roles[2]
