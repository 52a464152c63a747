"""Convolutional layers one after another as one compiled call, in frozen models on the CPU."""

from .module import FrozenConvnet

__all__ = ["FrozenConvnet"]
