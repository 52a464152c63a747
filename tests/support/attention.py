"""Calls of self-attention, by any backend."""

import torch

from ceit_kernels import self_attention, use_backend


def make_call(batch, tokens, heads, channels, dtype, num_queries=None, size=1.0, draw=0):
    """qkv and the gradient of the result."""
    generator = torch.Generator().manual_seed(draw)
    qkv = size * torch.randn(batch, tokens, 3 * heads * channels, generator=generator, dtype=torch.float64)
    grad_out = torch.randn(batch, num_queries or tokens, heads * channels, generator=generator, dtype=torch.float64)
    return qkv.to(dtype), grad_out.to(dtype)


def step(backend, qkv, grad_out, heads, **options):
    """The result and the gradient of qkv."""
    qkv = qkv.detach().requires_grad_()
    with use_backend(f"attention={backend}"):
        out = self_attention(qkv, num_heads=heads, num_queries=grad_out.shape[1], **options)
    out.backward(grad_out)
    return out.detach(), qkv.grad
