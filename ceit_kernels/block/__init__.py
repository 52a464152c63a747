"""Many layers in one call, at inference on the CPU."""

from .embedding import embedding_inference
from .encoder import EncoderParts, encoder_inference
from .layers import LayersParts, layers_inference
from .model import ModelParts, WholeModel, prepare_model

__all__ = [
    "EncoderParts",
    "LayersParts",
    "ModelParts",
    "WholeModel",
    "embedding_inference",
    "encoder_inference",
    "layers_inference",
    "prepare_model",
]
