"""Steps as the compiled code takes them: convolutions in units, and maps in slots of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .steps import ConvLayer, Size, Step

__all__ = ["Layers", "Unit", "fits", "slots_of", "units_of"]


Layers = tuple[ConvLayer | None, ConvLayer | None, ConvLayer | None]


@dataclass(frozen=True)
class Unit:
    """A step, or convolutions of which the compiled code needs no result but the last.

    Attributes:
        what: a step; or a pointwise convolution, one that mixes neighbours and a pointwise one, None for those that are
            missing. One with a gate is by itself.
        sources: the values that it reads.
        added: the value that is added to the result; None where nothing is.
        made: the value that it makes.
    """

    what: Step | Layers
    sources: tuple[int, ...]
    added: int | None
    made: int

    @property
    def reads(self) -> tuple[int, ...]:
        """All values that it reads."""
        return self.sources if self.added is None else (*self.sources, self.added)


def units_of(steps: Sequence[Step]) -> list[Unit]:
    """The steps in units, in order."""
    readers: dict[int, list[int]] = {}
    for i, step in enumerate(steps):
        for value in step.reads:
            readers.setdefault(value, []).append(i)
    units, row = [], []
    for i, step in enumerate(steps):
        if isinstance(step, ConvLayer):
            row.append(step)
            behind = steps[i + 1] if i + 1 < len(steps) else None
            alone = readers.get(i + 1) == [i + 1] and step.added is None and step.gate is None
            if alone and isinstance(behind, ConvLayer) and behind.gate is None and behind.sources == (i + 1,):
                continue
            made = i + 1 - len(row)
            for roles in _roles(row):
                layers = [layer for layer in roles if layer is not None]
                made += len(layers)
                units.append(Unit(roles, layers[0].sources, layers[-1].added, made))
            row = []
        else:
            units.append(Unit(step, step.sources, None, i + 1))
    return units


def _roles(layers: Sequence[ConvLayer]) -> Iterator[Layers]:
    """Convolutions one after another, three at most at a time."""
    at = 0
    while at < len(layers):
        start = at
        roles: list[ConvLayer | None] = [None, None, None]
        mixes = [not layer.is_pointwise for layer in layers[at : at + 3]]
        if (mixes[:2] == [False, True] and layers[at + 1].is_depthwise) or mixes in ([False, False], [False] * 3):
            roles[0], at = layers[at], at + 1
        if not layers[at].is_pointwise:
            roles[1], at = layers[at], at + 1
        # A pointwise layer ahead of a depthwise one belongs to that.
        expands = at + 1 < len(layers) and layers[at].is_pointwise and layers[at + 1].is_depthwise
        if at < len(layers) and layers[at].is_pointwise and not (expands and at > start and roles[0] is None):
            roles[2], at = layers[at], at + 1
        yield roles[0], roles[1], roles[2]


def slots_of(units: Sequence[Unit]) -> list[int]:
    """Where each value is kept, by its number: 0 is the input, 1 the result; -1 for values that no unit makes."""
    last_read = {value: i for i, unit in enumerate(units) for value in unit.reads}
    slots = [-1] * (units[-1].made + 1)
    slots[0] = 0
    for i, unit in enumerate(units):
        kept = {slots[value] for value, last in last_read.items() if last >= i and value < unit.made}
        free = next(slot for slot in range(2, len(slots) + 2) if slot not in kept)
        slots[unit.made] = 1 if unit is units[-1] else free
    return slots


def fits(steps: Sequence[Step], size: Size) -> bool:
    """Whether the steps compute images of a size."""
    sizes = [size]
    for step in steps:
        made = step.size([sizes[source] for source in step.sources])
        if made is None or any(sizes[added] != made for added in step.reads[len(step.sources) :]):
            return False
        sizes.append(made)
    return True
