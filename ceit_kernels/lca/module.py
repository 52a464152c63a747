"""Class-token attention across layers as a module: the plain one, and the fused one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import backends
from ..attention import Attention
from ..common.calls import foreign_reason, unsupported_reason
from ..common.children import ANY, child_reason, children_reason, declare_methods
from ..common.module import Fusion, attributes_of
from ..linear.module import LINEAR
from .functional import lca_attention

__all__ = ["FusedLCAAttention", "LCAAttention"]

_CHILDREN = {"qkv": LINEAR, "attn_drop": (nn.Dropout,), "proj": ANY, "proj_drop": ANY}


class LCAAttention(Attention):
    """Attention of the layer-wise class-token attention, LCA (CeiT, section 3.4): the last token asks all tokens.

    Parameters and arguments are those of ``Attention``.

    Shapes:
        (B, L, C) -> (B, 1, C), L class tokens in the order of their layers.
    """

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Let the last token of (B, L, C) attend to all."""
        if torch.jit.is_scripting():
            q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
            return self._attend(q[:, -1:], k, v)
        return self._attend(*self._parts(x))

    @torch.jit.unused
    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last token's query, and all tokens' keys and values, (B, 1 or L, H, D)."""
        if _has_any_global_hook() or child_reason("qkv", self.qkv, LINEAR) is not None:
            q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
            return q[:, -1:], k, v
        sizes = (x.shape[2], 2 * x.shape[2])
        q_weight, kv_weight = self.qkv.weight.split(sizes)
        q_bias, kv_bias = (None, None) if self.qkv.bias is None else self.qkv.bias.split(sizes)
        q = F.linear(x[:, -1:], q_weight, q_bias).unflatten(2, (self.num_heads, -1))
        k, v = F.linear(x, kv_weight, kv_bias).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        return q, k, v


declare_methods(LCAAttention, "_attend", "_parts")


class LCAAttentionFusion(Fusion, attributes_of(LCAAttention)):
    """``forward`` of class-token attention across layers, fused."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, C), the asking token last -> (B, 1, C).

        Raises:
            ValueError, TypeError, BackendError: as ``lca_attention``.
        """
        if torch.jit.is_scripting():
            return self._plain_forward(x)
        return self._fused_forward(x)

    @torch.jit.unused
    def _fused_forward(self, x: Tensor) -> Tensor:
        attention = self.attend(x)
        return super().forward(x) if attention is None else self.proj_drop(self.proj(attention))

    @torch.jit.unused
    def attend(self, x: Tensor) -> Tensor | None:
        """What ``forward`` projects at its end, (B, 1, C); None where the plain ``forward`` is to be called.

        Raises:
            ValueError, TypeError, BackendError: as ``forward``.
        """
        reason = unsupported_reason(x) or self.plain_reason()
        if reason is None:
            weight, bias = self.qkv.weight, self.qkv.bias
            reason = foreign_reason(weight, bias)
        if reason is not None:
            backends.leave_to_reference("lca", reason)
        if reason is not None or backends.current_backend("lca") == "reference":
            return None
        return lca_attention(
            x,
            weight,
            bias,
            num_heads=self.num_heads,
            scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )

    def plain_reason(self) -> str | None:
        """As of ``Fusion``."""
        reason = children_reason(self, _CHILDREN)
        if reason is None and self.attn_drop.p:
            if self.training != self.attn_drop.training:
                return "attn_drop is in another mode than the module"
            if self.training and self.attn_drop.p == 1:
                return "attn_drop drops everything"
        return reason


class FusedLCAAttention(LCAAttentionFusion, LCAAttention):
    """Attention of the last layer's class token to the class tokens of all layers (CeiT, section 3.4), fused.

    Constructor, children and state_dict are the plain module's.
    """
