"""Units as the compiled code reads them: lists of numbers, and of parameters that it prepacks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..leff.activations import INDICES
from .steps import Attention, ConvLayer, Norm, Pool, Step, Upsample
from .units import Layers, slots_of, units_of

__all__ = ["Prepacking"]

_KINDS = {Norm: 1, Attention: 2, Upsample: 3, Pool: 4}  # 0 is that of convolutions

# Of convolutions that are computed directly, as those of pictures: patches of few channels are mostly copied. Their
# terms are added one after another, by which longer sums would lose digits.
_FEW_CHANNELS, _MOST_TERMS = 4, 48


class Prepacking:
    """Numbers and parameters of steps, in the order in which csrc/cpu/convnet takes them."""

    def __init__(self, steps: Sequence[Step]) -> None:
        units = units_of(steps)
        slots = slots_of(units)
        self.parameters: list[Tensor | None] = []
        self.sizes: list[int] = [max(slots) + 1]
        for unit in units:
            sources = [slots[source] for source in unit.sources]
            added = -1 if unit.added is None else slots[unit.added]
            kind = 0 if isinstance(unit.what, tuple) else _KINDS[type(unit.what)]
            self.sizes += [kind, slots[unit.made], added, *sources, *[-1] * (3 - len(sources))]
            self._add(unit.what)

    def _add(self, what: Step | Layers) -> None:
        if isinstance(what, tuple):
            self._add_layers(what)
        elif isinstance(what, Norm):
            self.sizes += [what.width, what.window]
            self.parameters += [what.weight, what.bias, _scalar(what.eps)]
        elif isinstance(what, Attention):
            self._add_attention(what)
        elif isinstance(what, Upsample):
            self.sizes += [what.factor, INDICES[what.activation]]
        elif isinstance(what, Pool):
            self.sizes.append(what.channels)
            self.parameters += [what.scale, what.shift]

    def _add_attention(self, step: Attention) -> None:
        queries, keys = (0, 0) if step.bias is None else step.bias.shape[1:]
        self.sizes += [step.heads, step.key_channels, step.value_channels, step.window, queries, keys]
        self.sizes.append(int(step.mixing is not None))
        for first, head in zip(step.firsts, step.steps, strict=True):
            self.sizes += [first, head]
        self.parameters += [_scalar(step.scale), *([] if step.bias is None else [step.bias]), *(step.mixing or ())]

    def _add_layers(self, roles: Layers) -> None:
        gate, layers = roles[2] and roles[2].gate, [layer for layer in roles if layer is not None]
        present = sum(1 << i for i, part in enumerate((*roles, gate)) if part is not None)
        self.sizes += [present, INDICES[layers[-1].after]]
        for layer in layers:
            self._add_layer(layer)
        if gate is not None:
            self.sizes.append(int(gate.hard))
            for layer in gate.layers:
                self._add_layer(layer)

    def _add_layer(self, layer: ConvLayer) -> None:
        where = layer.side, layer.stride, layer.padding, INDICES[layer.activation]
        mixes_few = layer.side > 1 and layer.inputs <= _FEW_CHANNELS and not layer.is_depthwise
        directly = mixes_few and layer.side**2 * layer.inputs <= _MOST_TERMS
        self.sizes += [1 if layer.is_depthwise else 2 * directly, layer.inputs, layer.channels, *where]
        if layer.is_depthwise or directly:
            taps = layer.weight.double().permute(2, 3, 1, 0) * layer.scale  # one input channel where it is depthwise
            self.parameters += [taps.contiguous(), layer.shift]
        else:
            self.parameters += [layer.weight.permute(0, 2, 3, 1).contiguous(), layer.scale, layer.shift]


def _scalar(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64, device="cpu")
