"""Tokens put together with their positions, on a GPU; the backend of ``add_norm`` says whether."""

from .functional import embed_tokens, join_layers

__all__ = ["embed_tokens", "join_layers"]
