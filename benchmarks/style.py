"""Colors and marks that all pictures share, and where the numbers come from, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLORS = {"plain": "#64748b", "compile": "#2563eb", "fused": "#c2410c"}
OTHER_COLOR = "#cbd5e1"
OPERATOR_COLORS = {"leff": "#c2410c", "i2t": "#0f766e", "lca": "#7c3aed", "norm": "#a16207", "model": "#334155"}
MARKERS = {"plain": "s", "compile": "^", "fused": "o"}


def subtitle(data: Mapping[str, Any]) -> str:
    """The machine that a report was measured on."""
    environment = data["environment"]
    return f"measured on {environment['chip']}, {environment['threads']} threads"
