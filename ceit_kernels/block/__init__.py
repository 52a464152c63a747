"""Many layers in one call on the CPU: at inference, and an encoder block in training."""

from .embedding import embedding_inference
from .encoder import EncoderParts, encoder_inference
from .layers import LayersParts, layers_inference
from .model import ModelParts, WholeModel, prepare_model
from .training import encoder_training

__all__ = [
    "EncoderParts",
    "LayersParts",
    "ModelParts",
    "WholeModel",
    "embedding_inference",
    "encoder_inference",
    "encoder_training",
    "layers_inference",
    "prepare_model",
]
