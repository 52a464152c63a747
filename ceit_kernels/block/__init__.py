"""An encoder block at inference on the CPU, in one call."""

from .native_cpu import encoder_block_inference

__all__ = ["encoder_block_inference"]
