"""The image-to-tokens stem (I2T)."""

from .module import FusedImage2Tokens, Image2Tokens

__all__ = ["FusedImage2Tokens", "Image2Tokens"]
