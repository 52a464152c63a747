"""Whole blocks in one call, at inference on the CPU."""

from .encoder import EncoderParts, encoder_inference
from .layers import LayersParts, layers_inference

__all__ = ["EncoderParts", "LayersParts", "encoder_inference", "layers_inference"]
