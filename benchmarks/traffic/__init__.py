"""Launches and bytes of device memory, counted without a GPU: ``python -m benchmarks.traffic``."""

from .compiled import CompiledTrafficError, count_compiled
from .counting import Call, Kernel, count_call
from .modelled import modelled_seconds
from .tables import format_table

__all__ = [
    "Call",
    "CompiledTrafficError",
    "Kernel",
    "count_call",
    "count_compiled",
    "format_table",
    "modelled_seconds",
]
