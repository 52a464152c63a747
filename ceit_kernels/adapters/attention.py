"""What the attention of other libraries' models shares: at inference on the CPU one call between its projections."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..attention.cpu import attention_infer_cpu
from ..common.autocast import autocast_dtype
from ..common.calls import is_eager, needs_gradient, unsupported_reason
from ..common.children import ANY, children_reason
from ..common.module import Fusion, attributes_of

__all__ = ["InferenceAttention"]


class InferenceAttention(Fusion, attributes_of(nn.Module)):
    """Calls its children as the plain ``forward`` does; what is between them is one call of the kernel.

    Attributes:
        own: the names of its own parameters and buffers, which it reads.
    """

    calls_children = True
    own: tuple[str, ...] = ()

    def plain_reason(self) -> str | None:
        """As of ``Fusion``."""
        reason = children_reason(self, dict.fromkeys(self._modules, ANY), self.own)
        return reason or (None if self._uses_sdpa() else "it does not call PyTorch's fused attention")

    def _uses_sdpa(self: Any) -> bool:
        """Whether the plain ``forward`` calls PyTorch's fused attention."""
        return self.fused_attn

    def _serves(self: Any, x: Tensor) -> bool:
        """Whether the kernel computes a call: inference in eager mode; tells why it does not."""
        reason = unsupported_reason(x)
        if reason is None and not (is_eager(x) and x.numel() and autocast_dtype(x) is None):
            reason = "only eager calls without autocast are served"
        reason = reason or self.plain_reason()
        if reason is None and (self.training or (torch.is_grad_enabled() and needs_gradient(x, *self.parameters()))):
            reason = "the kernel has no gradient and no dropout for this attention"
        if reason is not None:
            backends.leave_to_reference("attention", reason)
            return False
        return backends.choose("attention", x, x.dtype).backend == "native"

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """Attention of q (B, H, M, D) to k and v (B, H, N, D), with a bias (H, M, N) of the scores; (B, M, H * D).

        By PyTorch where a child gave more than its own forward does: a hook or an adapter whose parameters want
        gradients, or another dtype.
        """
        given = [t for t in (q, k, v, bias) if t is not None]
        if all(map(is_eager, given)) and not needs_gradient(*given) and len({t.dtype for t in given}) == 1:
            return attention_infer_cpu(q, k, v, bias, scale)
        backends.leave_to_reference("attention", "a child gives tensors that want a gradient or are of several dtypes")
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale).transpose(1, 2).flatten(2)
