"""What a module computes, as steps that the compiled code knows; each makes one value of others.

A value is a map (pixels, channels) of each image. Value 0 is the input, step i makes value i + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Attention", "ConvLayer", "Gate", "Norm", "NotConvolutions", "Pool", "Size", "Step", "Upsample"]

Size = tuple[int, int]  # height and width of a map


class NotConvolutions(Exception):
    """A module is something else than what the compiled code knows; the text says what."""


@dataclass(frozen=True)
class Step:
    """One of them.

    Attributes:
        sources: the values that it reads.
        channels: of the value that it makes.
    """

    sources: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Of the value that it makes."""
        raise NotImplementedError

    @property
    def reads(self) -> tuple[int, ...]:
        """The values that it reads, or adds to what it makes of them."""
        return self.sources

    def size(self, sources: Sequence[Size]) -> Size | None:
        """The map that it makes of others of these sizes; None where it makes none."""
        return sources[0]


@dataclass(frozen=True)
class ConvLayer(Step):
    """``after(activation(convolution(x) * scale + shift) + added)``.

    Attributes:
        weight: (outputs, inputs, side, side), or (channels, 1, side, side) where it is depthwise.
        scale, shift: (outputs,), of the convolution's bias and the norms behind it.
        stride, padding: of the convolution.
        is_depthwise: whether each channel has a kernel of its own.
        activation: a name.
        added: the value that is added; None where nothing is.
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
    def channels(self) -> int:
        """As of ``Step``."""
        return self.weight.shape[0]

    @property
    def reads(self) -> tuple[int, ...]:
        """As of ``Step``."""
        return self.sources if self.added is None else (*self.sources, self.added)

    @property
    def side(self) -> int:
        """Of the kernel."""
        return self.weight.shape[-1]

    @property
    def inputs(self) -> int:
        """Channels that it takes."""
        return self.weight.shape[0 if self.is_depthwise else 1]

    @property
    def is_pointwise(self) -> bool:
        """Whether it computes each pixel by itself."""
        return (self.side, self.stride, self.padding) == (1, 1, 0)

    def size(self, sources: Sequence[Size]) -> Size | None:
        """As of ``Step``."""
        rest = [length + 2 * self.padding - self.side for length in sources[0]]
        return None if min(rest) < 0 else (rest[0] // self.stride + 1, rest[1] // self.stride + 1)


@dataclass(frozen=True)
class Gate:
    """Squeeze-and-excitation: what two linear layers make of the mean over all pixels, behind a sigmoid.

    Attributes:
        layers: the one that reduces the channels, and the one that gives as many as there were.
        hard: whether the sigmoid is a hardsigmoid.
    """

    layers: tuple[ConvLayer, ConvLayer]
    hard: bool


@dataclass(frozen=True)
class Norm(Step):
    """LayerNorm of each pixel.

    Attributes:
        weight, bias: (channels,); None for 1 and 0.
        eps: of the norm.
        width: the channels.
        window: the side of windows, one after another in the result; 0 where it is in the order of the image.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    width: int
    window: int = 0

    @property
    def channels(self) -> int:
        """As of ``Step``."""
        return self.width

    def size(self, sources: Sequence[Size]) -> Size | None:
        """As of ``Step``."""
        whole = not self.window or all(length % self.window == 0 for length in sources[0])
        return sources[0] if whole else None


@dataclass(frozen=True)
class Attention(Step):
    """``softmax(scale * q k^T + bias) v`` of queries, keys and values, its three sources.

    Attributes:
        heads, key_channels, value_channels: of a head's queries and keys, and of its values.
        scale: of the scores.
        firsts: the first channel of queries, keys and values in their values.
        steps: the channels from one head to the next in these.
        bias: (heads, queries, keys) or None.
        window: the side of windows within which attention is, as of ``Norm``; the result is in the image's order.
        mixing: weights (heads, heads) of the scores ahead of the bias and of what the softmax gives, and what is added
            to that (heads,); None where heads are not mixed.
    """

    heads: int
    key_channels: int
    value_channels: int
    scale: float
    firsts: tuple[int, int, int]
    steps: tuple[int, int, int]
    bias: Tensor | None = None
    window: int = 0
    mixing: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def channels(self) -> int:
        """As of ``Step``."""
        return self.heads * self.value_channels

    def size(self, sources: Sequence[Size]) -> Size | None:
        """As of ``Step``."""
        (height, width), (keys_height, keys_width), values = sources
        queries, keys = height * width, keys_height * keys_width
        if self.window:
            queries = keys = self.window**2
        fits = self.bias is None or tuple(self.bias.shape[1:]) == (queries, keys)
        return (height, width) if fits and values == (keys_height, keys_width) else None


@dataclass(frozen=True)
class Upsample(Step):
    """Bilinear upsampling, ``align_corners=False``, and an activation."""

    width: int
    factor: int
    activation: str = "identity"

    @property
    def channels(self) -> int:
        """As of ``Step``."""
        return self.width

    def size(self, sources: Sequence[Size]) -> Size | None:
        """As of ``Step``."""
        return sources[0][0] * self.factor, sources[0][1] * self.factor


@dataclass(frozen=True)
class Pool(Step):
    """``mean of all pixels * scale + shift``, where the latter two are of norms around it, (channels,)."""

    scale: Tensor
    shift: Tensor

    @property
    def channels(self) -> int:
        """As of ``Step``."""
        return len(self.scale)

    def size(self, sources: Sequence[Size]) -> Size | None:
        """As of ``Step``."""
        return 1, 1
