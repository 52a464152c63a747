"""Whole blocks in one call, at inference on the CPU."""

from .embedding import embedding_inference
from .encoder import EncoderParts, encoder_inference
from .layers import LayersParts, layers_inference

__all__ = ["EncoderParts", "LayersParts", "embedding_inference", "encoder_inference", "layers_inference"]
