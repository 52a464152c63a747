"""Self-attention as a function of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..common.arguments import names_its_arguments
from ..common.autocast import autocast_dtype
from ..common.calls import needs_gradient, unsupported_reason
from .op import attention_operator
from .parts import attend_by_parts
from .reference import attention_reference

__all__ = ["attention_of_projection", "self_attention"]


@names_its_arguments
def self_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    scale: float | None = None,
    num_queries: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Multi-head self-attention over queries, keys and values as one projection writes them.

    Computes ``softmax(scale * q k^T) v`` for every head, reading the heads where they lie. By the backend that
    ``use_backend`` set. Differentiable once (any number of times by the reference with PyTorch's ``SDPBackend.MATH``).

    Args:
        qkv: (B, N, 3 * H * D), of each token the queries of all heads, then the keys, then the values.
        num_heads: heads H; the last dimension must be a multiple of 3 H.
        scale: factor of the scores, by default ``D ** -0.5``.
        num_queries: let only the first tokens attend, to all N; every token if None.
        dropout_p: probability of dropping an attention weight, in [0, 1); above 0 only the reference serves the call.

    Returns:
        (B, num_queries, H * D), the heads side by side; under autocast in autocast's dtype.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or value is wrong.
        BackendError: the backend that was asked for cannot serve the call.
    """
    return attention_of_projection(qkv, None, num_heads, scale, num_queries, dropout_p)


def attention_of_projection(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    scale: float | None,
    num_queries: int | None,
    dropout_p: float = 0.0,
    projection: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``self_attention``; a bias, which a projection added to qkv without a gradient, gets its gradient here.

    So does that of a projection behind it, weight and bias, which is computed here. With either the call has to be one
    that is served by Triton, without dropout.
    """
    if num_queries is None:
        num_queries = qkv.shape[1] if qkv.dim() == 3 else 0
    training = needs_gradient(qkv, bias)
    attention_operator.check(qkv, num_heads, scale, num_queries, training)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    factor = (qkv.shape[2] // (3 * num_heads)) ** -0.5 if scale is None else scale
    unsupported = "the kernels have no attention dropout" if dropout_p > 0.0 else unsupported_reason(qkv)
    dtype = autocast_dtype(qkv) or qkv.dtype
    backend = backends.choose("attention", qkv, dtype, unsupported).backend
    if (
        bias is not None
        or projection is not None
        or (backend == "triton" and training and not torch.compiler.is_compiling())
    ):
        return attend_by_parts(qkv, bias, num_heads, factor, num_queries, projection)
    if backend in ("reference", "triton"):
        return attention_reference(qkv, num_heads, factor, num_queries, dropout_p)
    return attention_operator(qkv.to(dtype), num_heads, factor, num_queries, training, backend)[0]
