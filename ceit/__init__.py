"""The CeiT family of vision transformers, with the fused operators of `ceit_kernels` behind one argument."""

from ceit_kernels import register_freezing

from .checkpoint import load_checkpoint
from .freezing import prepare_ceit
from .model import CeiT
from .registry import create_model, list_models

__all__ = ["CeiT", "create_model", "list_models", "load_checkpoint"]

register_freezing(CeiT, prepare_ceit)
