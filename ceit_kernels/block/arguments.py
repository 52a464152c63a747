"""What the blocks' compiled calls have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import backends
from ..common.autocast import autocast_dtype
from ..common.registration import is_plain_call

__all__ = ["attention_arguments", "attention_schema", "may_go_at_once"]

attention_schema = (
    "Tensor? norm_weight1, Tensor? norm_bias1, float eps1, Tensor qkv_weight, Tensor? qkv_bias, int heads, "
    "float scale, Tensor projection_weight, Tensor? projection_bias, Tensor? norm_weight2, Tensor? norm_bias2, "
    "float eps2"
)


def may_go_at_once(x: Tensor, operators: Sequence[str]) -> bool:
    """Whether several operators may run as one: no gradient is wanted, nobody watches, and all would run natively."""
    return (
        not torch.is_grad_enabled()
        and is_plain_call(x)
        and autocast_dtype(x) is None
        and not _has_any_global_hook()
        and all(backends.choose(name, x, x.dtype).backend == "native" for name in operators)
    )


def attention_arguments(
    norm1: nn.Module, attention: nn.Module, norm2: nn.Module, rows: int, pack: Callable[[Tensor, int], Tensor]
) -> tuple:
    """Of ``attention_schema``: norms in the type of sums, weights packed for products of about so many rows."""
    wide = torch.promote_types(attention.qkv.weight.dtype, torch.float32)
    norms = [
        tuple(None if tensor is None else tensor.detach().to(wide).contiguous() for tensor in (norm.weight, norm.bias))
        for norm in (norm1, norm2)
    ]
    qkv, projection = ((pack(layer.weight, rows), layer.bias) for layer in (attention.qkv, attention.proj))
    of_attention = (*qkv, attention.num_heads, attention.scale, *projection)
    return (*norms[0], norm1.eps, *of_attention, *norms[1], norm2.eps)
