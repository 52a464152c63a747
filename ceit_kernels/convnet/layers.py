"""What the modules of a frozen model compute, found by following their calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..adapters.chains import Chain, chain_of
from ..adapters.heads import Head
from ..adapters.recipes import recipe_of
from ..common.calls import foreign_reason
from ..common.children import child_reason, has_own, held, qualified_name
from ..leff.activations import MODULES, activation_name
from ..leff.norms import of_module
from ..linear.module import LINEAR
from .convolutions import convolution_of, exact, linear_of
from .steps import Attention, ConvLayer, Gate, Norm, NotConvolutions, Pool, Step, Upsample

__all__ = ["Steps", "steps_of", "whole_of"]

_BATCH_NORM_ACT = "timm.layers.norm_act.BatchNormAct2d"
_LAYER_NORMS = nn.LayerNorm, "timm.layers.norm.LayerNorm"
_TIMM_LINEAR = "timm.layers.linear.Linear"  # which differs from PyTorch's in TorchScript
_LAYER_NORMS_2D = ("timm.layers.norm.LayerNorm2d",)  # of images
# Of images, in timm 1.0.20 in the models' own files, and of tokens.
_LAYER_SCALES = (
    (
        "timm.layers.layer_scale.LayerScale2d",
        "timm.models._efficientnet_blocks.LayerScale2d",
        "timm.models.efficientformer_v2.LayerScale2d",
    ),
    ("timm.layers.layer_scale.LayerScale",),
)
# Which do nothing in evaluation mode.
_IDLE = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    "timm.layers.drop.DropPath",
    "torchvision.ops.stochastic_depth.StochasticDepth",
    "transformers.models.segformer.modeling_segformer.SegformerDropPath",
)
_SIGMOIDS = nn.Sigmoid, "timm.layers.activations.Sigmoid"
_HARDSIGMOIDS = nn.Hardsigmoid, "timm.layers.activations.HardSigmoid"


def steps_of(module: nn.Module) -> Steps:
    """The steps of a module in evaluation mode, behind the children that it calls ahead of them.

    Raises:
        NotConvolutions: it has others, or something was done to it that calls of its parts would show.
    """
    found = Steps()
    found.call("the module", module)
    if any(part.training for part in module.modules()):
        raise NotConvolutions("a part of the module is in training mode")
    found.end()
    return found


def whole_of(features: Steps, module: nn.Module, head: Head) -> Steps:
    """The steps of a whole model, of which the first are those of its features.

    Raises:
        NotConvolutions: as of ``steps_of``; or the others do not begin with pooling.
    """
    found, count = features.copy(), len(features.steps)
    found.own("the model", module, head.methods)
    head.follow(found, "the model", module)
    found.end()
    same = all(ours is theirs for ours, theirs in zip(features.steps, found.steps, strict=False))
    if not same or not isinstance(found.steps[count], Pool):
        raise NotConvolutions("the model does something else to its features than to pool them")
    return found


class Steps:
    """The steps of what was called so far.

    Attributes:
        steps: step i makes value i + 1; value 0 is the input.
        value: what the next call reads.
        inputs: channels of the input.
        of_tokens: whether channels are the last dimension of the value, not the second of images; None: not known.
        takes_tokens: whether they were that of the input.
        is_flat: whether the value is a vector for each image, which was a map of one pixel.
        gate: what multiplies the value.
        conditions: what holds as long as the modules do this, beside their state.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.value = 0
        self.inputs: int | None = None
        self.of_tokens: bool | None = None
        self.takes_tokens = self.is_flat = False
        self.gate: Gate | None = None
        self.conditions: list[Callable[[], bool]] = []
        self._shared: set[int] = set()  # values that others than the next step read

    def copy(self) -> Steps:
        """The same steps, which others may follow."""
        made = copy.copy(self)
        made.steps, made.conditions, made._shared = [*self.steps], [*self.conditions], {*self._shared}
        return made

    def end(self) -> None:
        """No more is called.

        Raises:
            NotConvolutions: what was called gives something else than the last value.
        """
        if self.gate is not None:
            raise NotConvolutions("the module ends with a gate")
        pointwise = all(isinstance(s, Norm) or (isinstance(s, ConvLayer) and s.is_pointwise) for s in self.steps)
        as_taken = self.is_flat or self.takes_tokens == bool(self.of_tokens)
        if not as_taken or (self.takes_tokens and not pointwise):
            raise NotConvolutions("the module takes tokens without saying of what image")
        if self.value != len(self.steps):
            raise NotConvolutions("the module gives another value than its last")

    def own(self, name: str, module: nn.Module, methods: Iterable[str]) -> None:
        """A module has the methods that its class was written with."""
        for method in methods:
            is_own = partial(has_own, type(module), method)
            if method in vars(module) or not is_own():
                raise NotConvolutions(f"{name} has another {method}")
            self.conditions.append(is_own)

    def call(self, name: str, module: nn.Module) -> None:
        """A module is called with the value."""
        kind = type(module)
        reason = child_reason(name, module, (kind,))
        reason = reason or foreign_reason(*module._parameters.values(), *module._buffers.values())
        if reason is not None:
            raise NotConvolutions(reason)
        if kind is nn.Conv2d:
            self._convolve(name, convolution_of(name, module), False)
        elif kind in LINEAR or qualified_name(kind) == _TIMM_LINEAR:
            self._convolve(name, linear_of(module), True)
        elif child_reason(name, module, _IDLE) is None:
            pass
        elif not self.of_tokens and (kind is nn.BatchNorm2d or qualified_name(kind) == _BATCH_NORM_ACT):
            self._fold_norm(name, module)
            if kind is not nn.BatchNorm2d:
                self.calls(name, module, ("drop", "act"))
        elif kind is nn.LayerNorm or qualified_name(kind) in _LAYER_NORMS + _LAYER_NORMS_2D:
            self.norm(name, module, of_tokens=qualified_name(kind) not in _LAYER_NORMS_2D)
        elif qualified_name(kind) in _LAYER_SCALES[bool(self.of_tokens)]:
            gamma = exact(held(module, "gamma"))
            self._multiply_add(name, gamma, torch.zeros_like(gamma))
        elif child_reason(name, module, MODULES) is None and activation_name(module) is not None:
            self._activate(name, str(activation_name(module)))
        elif kind is nn.Upsample:
            self._upsample(name, module)
        elif (recipe := recipe_of(module)) is not None:
            recipe(self, name, module)
        else:
            self._chain(name, module)

    def calls(self, name: str, module: nn.Module, children: Iterable[str]) -> None:
        """Children are called one after another; those that are missing or None are left out."""
        for child in children:
            called = module._modules.get(child)
            if called is not None:
                self.call(f"{name}.{child}", called)

    def call_on_image(self, name: str, module: nn.Module) -> None:
        """A module is called with the image that the tokens are."""
        if self.is_flat:
            raise NotConvolutions(f"{name} takes an image")
        before, self.of_tokens = self.of_tokens, False
        self.call(name, module)
        self.of_tokens = before

    def branch(self, value: int, name: str, module: nn.Module, *children: str) -> int:
        """Children are called with another value; returns the value that they make."""
        self.value = value
        self._shared.add(value)
        self.calls(name, module, children)
        return self.value

    @contextmanager
    def shortcut(self, name: str) -> Iterator[None]:
        """The value is added to what is made of it within."""
        first = self.value
        self._shared.add(first)
        yield
        self.add(name, first)

    def only(self, name: str, module: nn.Module, children: Collection[str], own: Collection[str] = ()) -> None:
        """A module has no other children that do anything, and no other tensors of its own.

        Raises:
            NotConvolutions: it has.
        """
        for child, other in module._modules.items():
            if other is not None and child not in children and child_reason(child, other, _IDLE) is not None:
                raise NotConvolutions(f"{name} has {child}")
        tensors = (tensor for kind in (module._parameters, module._buffers) for tensor in kind if tensor not in own)
        if other := next(tensors, None):
            raise NotConvolutions(f"{name} has {other} of its own")

    @staticmethod
    def refuse(reason: str) -> NoReturn:
        """Say that a module is something else."""
        raise NotConvolutions(reason)

    def append(self, step: Step) -> int:
        """The next step; returns the value that it makes."""
        if self.gate is not None and not isinstance(step, ConvLayer):
            raise NotConvolutions("a gate has no convolution behind it")
        self.steps.append(step)
        self._shared.update(value for value in step.sources if value != len(self.steps) - 1)
        self.value = len(self.steps)
        return self.value

    def channels(self, value: int) -> int | None:
        """Of a value; None for an input that nothing has read."""
        return self.steps[value - 1].channels if value else self.inputs

    def norm(self, name: str, module: Any, window: int = 0, of_tokens: bool = True) -> None:
        """LayerNorm of tokens or of an image's pixels; ``window`` as of ``Norm``."""
        reason = child_reason(name, module, _LAYER_NORMS if of_tokens else _LAYER_NORMS_2D)
        if reason or len(module.normalized_shape) != 1:
            raise NotConvolutions(reason or f"{name} is no norm of channels")
        (width,), weight, bias = module.normalized_shape, held(module, "weight"), held(module, "bias")
        self._read(name, width, of_tokens)
        weight, bias = (None if tensor is None else tensor.detach() for tensor in (weight, bias))
        self.append(Norm((self.value,), weight, bias, module.eps, width, window))

    def attention(self, name: str, sources: tuple[int, int, int], **settings: Any) -> int:
        """Attention of three values with the settings of ``Attention``; returns its value."""
        if self.is_flat:
            raise NotConvolutions(f"{name} takes tokens")
        step = Attention(sources, **settings)
        widths = step.key_channels, step.key_channels, step.value_channels
        for source, first, head, width in zip(sources, step.firsts, step.steps, widths, strict=True):
            if first + (step.heads - 1) * head + width > (self.channels(source) or 0):
                raise NotConvolutions(f"{name} has more heads than channels")
        if step.window and (step.mixing or step.key_channels != step.value_channels):
            raise NotConvolutions(f"{name} mixes heads within windows, or has values of other channels than keys")
        return self.append(step)

    def add(self, name: str, value: int) -> None:
        """Another value is added."""
        layer = self._last(name)
        if layer.added is not None or self.channels(value) != layer.channels:
            raise NotConvolutions(f"the shortcut of {name} ends behind another one, or has other channels")
        self._shared.add(value)
        self.steps[-1] = replace(layer, added=value)

    def pool(self, name: str) -> None:
        """The mean of all pixels of an image is taken."""
        channels = self.channels(self.value)
        if channels is None or self.of_tokens:
            raise NotConvolutions(f"{name} takes the mean of something else than an image")
        ones = torch.ones(channels, dtype=torch.float64, device="cpu")
        self.append(Pool((self.value,), ones, torch.zeros_like(ones)))

    def flatten(self, name: str) -> None:
        """An image of one pixel becomes a vector."""
        if not self.is_flat and (self.of_tokens or not self._is_pooled(self.value)):
            raise NotConvolutions(f"{name} takes an image of more than one pixel")
        self.of_tokens = self.is_flat = True

    def _is_pooled(self, value: int) -> bool:
        step = self.steps[value - 1] if value else None
        if isinstance(step, Norm) or (isinstance(step, ConvLayer) and step.is_pointwise):
            return self._is_pooled(step.sources[0])
        return isinstance(step, Pool)

    def scale(self, name: str, factor: float) -> None:
        """What a layer has made is multiplied."""
        self._multiply_add(name, torch.full_like(scale := self._last(name).scale, factor), torch.zeros_like(scale))

    def _read(self, name: str, channels: int, of_tokens: bool) -> None:
        """A layer reads the value."""
        if self.value == 0 and self.inputs is None:
            self.inputs, self.takes_tokens = channels, of_tokens
        elif (self.channels(self.value), self.of_tokens) != (channels, of_tokens):
            raise NotConvolutions(f"{name} takes {channels} channels of other tensors than it gets")
        self.of_tokens = of_tokens

    def _convolve(self, name: str, layer: ConvLayer, of_tokens: bool) -> None:
        self._read(name, layer.inputs, of_tokens)
        if self.gate is not None and not layer.is_pointwise:
            raise NotConvolutions(f"{name} follows a gate and is not pointwise")
        self.append(replace(layer, sources=(self.value,), gate=self.gate))
        self.gate = None

    def convolve(self, name: str, module: nn.Module, weight: Tensor) -> None:
        """An ``nn.Conv2d`` is called, with another weight."""
        self._convolve(name, replace(convolution_of(name, module), weight=weight), False)

    @staticmethod
    def pointwise(name: str, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Weight (outputs, inputs) and bias of a pointwise ``nn.Conv2d``, in float64."""
        reason = child_reason(name, module, (nn.Conv2d,))
        layer = None if reason else convolution_of(name, module)
        if layer is None or not layer.is_pointwise:
            raise NotConvolutions(reason or f"{name} is not pointwise")
        return exact(layer.weight).flatten(1), layer.shift

    def _chain(self, name: str, module: nn.Module) -> None:
        chain = chain_of(module)
        if chain is None:
            raise NotConvolutions(f"{name} is a {type(module).__name__}")
        if chain.method == "forward":
            called = *chain.children, chain.drop_child, *chain.behind, chain.gate, chain.pool
            self.only(name, module, tuple(filter(None, called)))
        if chain.gate is not None:
            self._gate(name, module, chain)
            return
        adds = getattr(module, chain.adds_input) if isinstance(chain.adds_input, str) else chain.adds_input
        if adds in (None, False):
            self._call_chain(name, module, chain)
        else:
            with self.shortcut(name):
                self._call_chain(name, module, chain)
                self.calls(name, module, filter(None, (chain.drop_child,)))
        self.calls(name, module, chain.behind)

    def _call_chain(self, name: str, module: nn.Module, chain: Chain) -> None:
        for child in chain.children:
            if child in chain.of_images:
                self.call_on_image(f"{name}.{child}", module._modules[child] or nn.Identity())
            else:
                self.calls(name, module, (child,))

    def _gate(self, name: str, module: Any, chain: Chain) -> None:
        within, children = Steps(), module._modules
        within.calls(name, module, chain.children)
        reason = child_reason("the gate", children[chain.gate], _SIGMOIDS + _HARDSIGMOIDS)
        pool = children[chain.pool] if chain.pool else nn.AdaptiveAvgPool2d(1)
        reason = reason or child_reason("the pooling", pool, (nn.AdaptiveAvgPool2d,))
        if reason or pool.output_size not in (1, (1, 1)) or getattr(module, "add_maxpool", False):
            raise NotConvolutions(reason or f"{name} takes more than the mean of all pixels")
        layers = [layer for layer in within.steps if isinstance(layer, ConvLayer) and layer.is_pointwise]
        if len(layers) != 2 or len(within.steps) != 2:
            raise NotConvolutions(f"{name} has other layers than two pointwise ones")
        reducing, expanding = layers
        channels = self._last(name).channels
        if not channels == reducing.inputs == expanding.channels or expanding.activation != "identity":
            raise NotConvolutions(f"{name} does not gate the {channels} channels that it gets")
        hard = child_reason("the gate", children[chain.gate], _HARDSIGMOIDS) is None
        self.gate = Gate((reducing, expanding), hard)

    def _last(self, name: str) -> ConvLayer:
        """The layer that has made the value, which nothing else reads."""
        last = self.steps[-1] if self.steps else None
        if self.gate is not None:
            raise NotConvolutions(f"{name} follows a gate")
        if not isinstance(last, ConvLayer) or self.value != len(self.steps) or self.value in self._shared:
            raise NotConvolutions(f"no convolution comes right before {name}")
        return last

    def _fold_norm(self, name: str, module: Any) -> None:
        norm = of_module(module)
        if norm is None or norm.training or norm.running_var is None:
            raise NotConvolutions(f"{name} takes statistics of the batch")
        scale = (exact(norm.running_var) + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * exact(norm.weight)
        shift = -exact(norm.running_mean) * scale
        self._multiply_add(name, scale, shift if norm.bias is None else shift + exact(norm.bias))

    def _multiply_add(self, name: str, scale: Tensor, shift: Tensor) -> None:
        last = self.steps[-1] if self.steps and self.value == len(self.steps) else None
        layer = last if isinstance(last, Pool) and self.value not in self._shared else self._last(name)
        if isinstance(layer, ConvLayer) and (layer.activation != "identity" or layer.added is not None):
            raise NotConvolutions(f"{name} follows an activation or a shortcut")
        self.steps[-1] = replace(layer, scale=layer.scale * scale, shift=layer.shift * scale + shift)

    def _activate(self, name: str, activation: str) -> None:
        if activation == "identity":
            return
        last = self.steps[-1] if self.steps and self.value == len(self.steps) else None
        if isinstance(last, Upsample) and last.activation == "identity":
            self.steps[-1] = replace(last, activation=activation)
            return
        layer = self._last(name)
        which = "activation" if layer.added is None else "after"
        if getattr(layer, which) != "identity":
            raise NotConvolutions(f"{name} follows an activation")
        self.steps[-1] = replace(layer, **{which: activation})

    def _upsample(self, name: str, module: Any) -> None:
        factor, channels = module.scale_factor, self.channels(self.value)
        whole = isinstance(factor, float | int) and factor == int(factor) and module.size is None
        if not whole or channels is None or module.mode != "bilinear" or module.align_corners or self.of_tokens:
            raise NotConvolutions(f"{name} is not bilinear by a whole factor")
        self.append(Upsample((self.value,), channels, int(factor)))
