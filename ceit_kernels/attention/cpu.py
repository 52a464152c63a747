"""The schemas of ``csrc/cpu/attention``: self-attention on the CPU, a block of queries at a time."""

from __future__ import annotations

import torch

__all__ = ["kernels"]

for _schema in (
    "_attention(Tensor qkv, int num_heads, float scale, Tensor(a!) out, Tensor(b!)? statistics) -> ()",
    "_attention_backward(Tensor grad_out, Tensor qkv, Tensor statistics, int num_heads, float scale, "
    "Tensor(a!) grad_qkv) -> ()",
):
    torch.library.define(f"ceit::{_schema.partition('(')[0]}", f"({_schema.partition('(')[2]}")

kernels = torch.ops.ceit
