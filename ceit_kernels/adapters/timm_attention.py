"""Attention of timm's TinyViT (https://arxiv.org/abs/2207.10666), PVTv2 and EfficientFormerV2, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, jit

from .attention import InferenceAttention

__all__ = ["EfficientFormerAttention", "PVTv2Attention", "TinyViTAttention"]


class TinyViTAttention(InferenceAttention):
    """``timm.models.tiny_vit.Attention``, whose scores have a bias by the distance of tokens."""

    own = "attention_biases", "attention_bias_idxs"

    def plain_reason(self: Any) -> str | None:
        """As of ``Fusion``."""
        same = self.val_dim == self.key_dim
        return super().plain_reason() or (None if same else "values have other channels than keys")

    def forward(self: Any, x: Tensor) -> Tensor:
        """Tokens of windows, (B, N, C) -> (B, N, C)."""
        if jit.is_scripting():
            return self._plain_forward(x)
        return self._fused_forward(x)

    @jit.unused
    def _fused_forward(self: Any, x: Tensor) -> Tensor:
        if not self._serves(x):
            return super().forward(x)
        bias = self.get_attention_biases(x.device).view(self.num_heads, *x.shape[1:2] * 2)
        qkv = self.qkv(self.norm(x)).unflatten(2, (self.num_heads, 3, self.key_dim))
        q, k, v = qkv.transpose(1, 2).unbind(3)
        # The kernel of PyTorch has this scale too.
        return self.proj(self._attend(q, k, v, bias, self.key_dim**-0.5))


class PVTv2Attention(InferenceAttention):
    """``timm.models.pvt_v2.Attention``, of all tokens to those of a smaller image."""

    def forward(self: Any, x: Tensor, feat_size: list[int]) -> Tensor:
        """x (B, H * W, C), feat_size [H, W] -> (B, H * W, C)."""
        if jit.is_scripting():
            return self._plain_forward(x, feat_size)
        return self._fused_forward(x, feat_size)

    @jit.unused
    def _fused_forward(self: Any, x: Tensor, feat_size: list[int]) -> Tensor:
        if not self._serves(x):
            return super().forward(x, feat_size)
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        kv = self.kv(self._reduced(x, feat_size)).unflatten(2, (2, self.num_heads, -1))
        k, v = kv.transpose(1, 3).unbind(2)
        return self.proj_drop(self.proj(self._attend(q, k, v, None, self.head_dim**-0.5)))

    def _reduced(self: Any, x: Tensor, feat_size: list[int]) -> Any:
        if self.pool is None and self.sr is None:
            return x
        image = x.transpose(1, 2).unflatten(2, feat_size)
        image = image if self.pool is None else self.pool(image)
        tokens = self.norm(self.sr(image).flatten(2).transpose(1, 2))
        return tokens if self.act is None else self.act(tokens)


class EfficientFormerAttention(InferenceAttention):
    """``timm.models.efficientformer_v2.Attention2d``, some of a smaller image that is upsampled behind it.

    PyTorch upsamples maps of many channels in channels-last memory, and copies others there and back at their full
    size: here they are copied before.
    """

    own = "attention_biases", "attention_bias_idxs"

    def _uses_sdpa(self: Any) -> bool:
        return True

    def forward(self: Any, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, C, H, W)."""
        if jit.is_scripting():
            return self._plain_forward(x)
        return self._fused_forward(x)

    @jit.unused
    def _fused_forward(self: Any, x: Tensor) -> Tensor:
        if not self._serves(x):
            return super().forward(x)
        heads = len(x), self.num_heads, -1, self.N
        small = x if self.stride_conv is None else self.stride_conv(x)
        q, k, v = self.q(small), self.k(small), self.v(small)
        local = self.v_local(v)
        scores = (q.reshape(heads).transpose(2, 3) @ k.reshape(heads)) * self.scale
        scores = self.talking_head1(scores + self.get_attention_biases(x.device))
        attended = self.talking_head2(scores.softmax(dim=-1)) @ v.reshape(heads).transpose(2, 3)
        image = attended.transpose(2, 3).reshape(len(x), self.dh, *self.resolution) + local
        if self.upsample is not None:
            image = self.upsample(image.contiguous(memory_format=torch.channels_last))
        return self.proj(self.act(image)).contiguous()
