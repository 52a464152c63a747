"""Fused operators for CeiT and its relatives.

``FusedLeFF``, ``FusedLCAAttention`` and ``FusedImage2Tokens`` are modules to drop into a model; ``fuse`` puts them into
a model that has the plain ones. ``status`` says what would run them here, and why.
"""

from .backends import BackendError, fast_operators, status, use_backend
from .fuse import fuse, register_fusion, unfuse
from .i2t import FusedImage2Tokens
from .lca import FusedLCAAttention, lca_attention
from .leff import FusedLeFF

__all__ = [
    "BackendError",
    "FusedImage2Tokens",
    "FusedLCAAttention",
    "FusedLeFF",
    "fast_operators",
    "fuse",
    "lca_attention",
    "register_fusion",
    "status",
    "unfuse",
    "use_backend",
]
__version__ = "0.1.0"
