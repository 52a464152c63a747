"""Class-token attention across layers as a function of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..common.arguments import names_its_arguments
from ..common.autocast import autocast_dtype
from ..common.calls import needs_gradient, unsupported_reason
from .op import lca_operator
from .reference import lca_reference

__all__ = ["lca_attention"]


@names_its_arguments
def lca_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None = None,
    *,
    num_heads: int,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention of the last layer's class token to the class tokens of all layers (CeiT, section 3.4).

    Computes ``softmax(scale * q k^T) v`` with one query, ``q = x[:, -1] W_q^T + b_q``, and ``k``, ``v`` from all of x,
    by the backend that ``use_backend`` set. Differentiable once (any number of times by the reference).

    Args:
        x: class tokens (B, L, C), one for each of L layers, the asking one last.
        qkv_weight: (3C, C), the rows of W_q, W_k and W_v one below another, each head's rows together.
        qkv_bias: (3C,) or None.
        num_heads: heads H; C must be a multiple of it.
        scale: factor of the scores, by default ``(C / H) ** -0.5``.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        seed: int64 (1,) on the device of x, read where ``dropout_p > 0``: the same seed drops the same weights on
            every backend. Drawn from PyTorch's generator if None.

    Returns:
        (B, 1, C), the heads side by side, before the output projection; under autocast in autocast's dtype.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is wrong.
        BackendError: the backend that was asked for cannot serve the call.
    """
    factor = (x.shape[-1] // max(num_heads, 1)) ** -0.5 if scale is None else scale
    if dropout_p > 0.0 and seed is None:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    compute_dtype, training = autocast_dtype(x), needs_gradient(x, qkv_weight, qkv_bias)
    inputs = x, qkv_weight, qkv_bias, seed, num_heads, factor, dropout_p, training, compute_dtype
    lca_operator.check(*inputs)
    unsupported = lca_operator.unsupported(*inputs) or unsupported_reason(x, qkv_weight, qkv_bias)
    backend = backends.choose("lca", x, compute_dtype or x.dtype, unsupported).backend
    if backend == "reference":
        return lca_reference(x, qkv_weight, qkv_bias, num_heads, factor, dropout_p, seed)
    return lca_operator(*inputs, backend)[0]
