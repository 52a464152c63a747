"""Attention of other libraries whose scores have a bias, in frozen models on the CPU."""

from __future__ import annotations

from typing import Any

from ..common.children import held, qualified_name

__all__ = ["prepare_attention_bias"]

# Which keep the bias (heads, N, N) of each device, and give it to PyTorch's attention.
_KEEPING = ("timm.models.tiny_vit.Attention",)


def prepare_attention_bias(module: Any) -> None:
    """Keep the bias as (1, heads, N, N): of three dimensions PyTorch's flash attention takes no mask on the CPU."""
    name = qualified_name(type(module))
    if name not in _KEEPING or qualified_name(type(module).forward) != f"{name}.forward":
        return
    biases = held(module, "attention_biases")
    if module.fused_attn and biases.device.type == "cpu":
        module.attention_bias_cache = {str(biases.device): biases[:, module.attention_bias_idxs][None]}
