"""Fused operators for CeiT and its relatives.

``FusedLeFF``, ``FusedLCAAttention``, ``FusedImage2Tokens``, ``FusedAddNorm``, ``FusedLinear`` and ``FusedAttention``
are modules to drop into a model; ``fuse`` puts them into a model that has the plain ones. ``status`` says what would
run them here and why.
"""

from .add_norm import FusedAddNorm, add_layer_norm
from .attention import FusedAttention, self_attention
from .backends import BackendError, fast_operators, status, use_backend
from .common.tuning import autotune
from .explain import explain
from .freeze import Frozen, freeze, register_freezing
from .fuse import fuse, register_fusion, unfuse
from .graphs import Graphed, graphed
from .i2t import FusedImage2Tokens
from .lca import FusedLCAAttention, lca_attention
from .leff import BatchNorm, FusedLeFF, leff_block
from .linear import FusedLinear, FusedPatchProjection
from .warm_up import warm_up

__all__ = [
    "BackendError",
    "BatchNorm",
    "Frozen",
    "FusedAddNorm",
    "FusedAttention",
    "FusedImage2Tokens",
    "FusedLCAAttention",
    "FusedLeFF",
    "FusedLinear",
    "FusedPatchProjection",
    "Graphed",
    "add_layer_norm",
    "autotune",
    "explain",
    "fast_operators",
    "freeze",
    "fuse",
    "graphed",
    "lca_attention",
    "leff_block",
    "register_freezing",
    "register_fusion",
    "self_attention",
    "status",
    "unfuse",
    "use_backend",
    "warm_up",
]
__version__ = "0.1.0"
