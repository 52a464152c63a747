"""Multi-head self-attention as a module: the plain one, and the fused one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..common.arguments import check_at_least, check_probability, names_its_arguments
from ..common.autocast import autocast_dtype
from ..common.calls import foreign_reason, unsupported_reason
from ..common.children import ANY, child_reason, children_reason, declare_methods, held
from ..common.module import Fusion, attributes_of
from .functional import attention_of_projection

__all__ = ["Attention", "FusedAttention"]

_CHILDREN = {"qkv": ANY, "attn_drop": (nn.Dropout,), "proj": ANY, "proj_drop": ANY}
_LINEAR = (nn.Linear, "ceit_kernels.linear.module.FusedLinear")


class Attention(nn.Module):
    """Multi-head self-attention of ViT (CeiT, section 3.1).

    Args:
        dim: channels C of a token, a multiple of ``num_heads``.
        num_heads: heads H.
        qkv_bias: give the query, key and value projections a bias.
        qk_scale: factor of the scores, by default ``(C / H) ** -0.5``.
        attn_drop: probability of dropping an attention weight, in [0, 1).
        proj_drop: probability of dropping an output channel.

    Shapes:
        (B, N, C) -> (B, num_queries, C), N queries by default.

    Raises:
        ValueError, TypeError: ``num_heads`` is no divisor of ``dim``, or another argument is out of its range.
    """

    @names_its_arguments
    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim)
        check_probability(attn_drop=attn_drop, proj_drop=proj_drop)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim={dim}, got {num_heads}")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """Let the first ``num_queries`` tokens of (B, N, C) attend to all, every token if None."""
        # Parted where they lie, so that the gradients are put together there in one pass.
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)  # (B, N, H, D) each
        return self._attend(q if num_queries is None else q[:, :num_queries], k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The projected attention (B, N, C) of queries (B, N, H, D) to keys and values (B, L, H, D)."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def extra_repr(self) -> str:
        """What ``print`` shows beside the children."""
        return f"num_heads={self.num_heads}, scale={self.scale:.4g}"


declare_methods(Attention, "_attend")


class AttentionFusion(Fusion, attributes_of(Attention)):
    """``forward`` of multi-head self-attention, fused on the CPU. The projections are called, whatever they are.

    On a GPU those that are exactly linear layers are computed here in training: their biases' gradients are then summed
    in the pass that puts those of queries, keys and values together.
    """

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """x (B, N, C) -> (B, num_queries, C): the first ``num_queries`` tokens, or all, attend to all.

        Raises:
            ValueError, TypeError, BackendError: as ``self_attention``.
        """
        if torch.jit.is_scripting():
            return self._plain_forward(x, num_queries)
        return self._fused_forward(x, num_queries)

    @torch.jit.unused
    def _fused_forward(self, x: Tensor, num_queries: int | None) -> Tensor:
        reason = unsupported_reason(x) or self.plain_reason()
        if reason is not None:
            backends.leave_to_reference("attention", reason)
        if reason is not None or backends.current_backend("attention") == "reference":
            return super().forward(x) if num_queries is None else super().forward(x, num_queries)
        return self._project_attention(*self._project(x), num_queries)

    def forward_first(self, x: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
        """What ``forward`` returns for all tokens, without a gradient, and for the first ``num_queries``, with theirs.

        For tokens of which the others count for statistics alone: a gradient that is zero is not computed.

        Raises:
            ValueError: for dropout, whose draws would differ.
        """
        if self.training and (self.attn_drop.p or self.proj_drop.p):
            raise ValueError(f"attn_drop, proj_drop: expected none, got {self.attn_drop.p} and {self.proj_drop.p}")
        serves = unsupported_reason(x) is None and self.plain_reason() is None
        qkv, bias = self._project(x) if serves else (self.qkv(x), None)
        with torch.no_grad():
            every = self._project_attention(qkv, None, None)
        return every, self._project_attention(qkv, bias, num_queries)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The projection of x, and its bias if that has no gradient by it, which attention is to take then."""
        bias = self._bias_without_gradient("qkv", x)
        if bias is None:
            return self.qkv(x), None
        return F.linear(x, held(self.qkv, "weight"), bias.detach()), bias

    def _bias_without_gradient(self, name: str, x: Tensor) -> Tensor | None:
        """The bias of a projection where attention takes its gradient, None where the projection is called."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        projection: nn.Module = getattr(self, name)
        if child_reason(name, projection, _LINEAR) or backends.current_backend("linear") not in ("auto", "reference"):
            return None
        bias = held(projection, "bias")
        if bias is None or not bias.requires_grad or foreign_reason(x, held(projection, "weight"), bias):
            return None
        backend = backends.choose("attention", x, autocast_dtype(x) or x.dtype).backend
        return bias if backend == "triton" else None

    def _project_attention(self, qkv: Tensor, bias: Tensor | None, num_queries: int | None) -> Tensor:
        projection, out_bias = None, None
        # Where nothing ahead of it has a gradient, attention would be taken back for the sum alone.
        if (qkv.requires_grad or bias is not None) and qkv.dtype == (autocast_dtype(qkv) or qkv.dtype):
            out_bias = self._bias_without_gradient("proj", qkv)
        if out_bias is not None and 3 * out_bias.shape[0] == qkv.shape[-1]:
            projection = held(self.proj, "weight"), out_bias
        arguments = qkv, bias, self.num_heads, self.scale, num_queries, 0.0, projection
        out = attention_of_projection(*arguments)
        return self.proj_drop(self.proj(out) if projection is None else out)

    def plain_reason(self) -> str | None:
        """As of ``Fusion``."""
        reason = children_reason(self, _CHILDREN)
        if reason is None and self.attn_drop.p and (self.training or self.attn_drop.training):
            return "the kernels have no attention dropout"
        return reason


class FusedAttention(AttentionFusion, Attention):
    """Multi-head self-attention of ViT (CeiT, section 3.1), fused on the CPU.

    Constructor, children and state_dict are the plain module's.
    """
