"""``ceit::lca`` and its backward: schema, checks, autograd, autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..common.autocast import autocast_dtype
from ..common.checks import check_device, check_dtype, check_floating, check_shape
from ..common.flops import matmul_flops, register_flops
from ..common.registration import loop_over_batch, refuse_gradient, register_autocast, unsupported_reason
from .cpu import lca_attention_cpu
from .reference import lca_attention_reference

__all__ = ["lca_attention"]

_MAX_LAYERS, _MAX_HEAD_DIM = 128, 256

torch.library.define(
    "ceit::lca",
    "(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor? seed, int num_heads, float scale, float dropout_p, "
    "ScalarType? compute_dtype, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "ceit::lca_backward",
    "(Tensor grad_out, Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor? seed, int num_heads, float scale, "
    "float dropout_p, ScalarType? compute_dtype, bool need_input, bool need_weight, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
    by the backend that ``use_backend`` set. Differentiable once (any number of times without Triton).

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
    scale = (x.shape[-1] // max(num_heads, 1)) ** -0.5 if scale is None else scale
    _check(x, qkv_weight, qkv_bias, seed, num_heads, dropout_p, autocast_dtype(x))
    if dropout_p > 0.0 and seed is None:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    limit = _limit(x, num_heads) or unsupported_reason(x, qkv_weight, qkv_bias)
    choice = backends.choose("lca", x, autocast_dtype(x) or x.dtype, limit)
    if choice.backend == "reference":
        return lca_attention_reference(x, qkv_weight, qkv_bias, num_heads, scale, dropout_p, seed)
    if choice.backend == "native":
        return lca_attention_cpu(x, qkv_weight, qkv_bias, num_heads, scale, dropout_p, seed)
    return torch.ops.ceit.lca(x, qkv_weight, qkv_bias, seed, num_heads, scale, dropout_p, None, choice.backend)


def _check(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    dropout_p: float,
    compute_dtype: torch.dtype | None,
) -> None:
    check_shape("x", x, "B", "L", "C")
    check_floating("x", x)
    channels = x.shape[2]
    if x.shape[1] < 1 or channels < 1:
        raise ValueError(f"x: expected shape (B, L, C) with at least one layer and channel, got {tuple(x.shape)}")
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the {channels} channels of x, got {num_heads}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    check_shape("qkv_weight", qkv_weight, 3 * channels, channels)
    parameters = {"qkv_weight": qkv_weight}
    if qkv_bias is not None:
        check_shape("qkv_bias", qkv_bias, 3 * channels)
        parameters["qkv_bias"] = qkv_bias
    for name, parameter in parameters.items():
        check_device(name, parameter, x, "x")
        check_floating(name, parameter)
        if compute_dtype is None:
            check_dtype(name, parameter, x.dtype, "x")
    if seed is not None:
        check_shape("seed", seed, 1)
        check_dtype("seed", seed, torch.int64, "every seed")
        check_device("seed", seed, x, "x")


def _limit(x: Tensor, num_heads: int) -> str | None:
    layers, head_dim = x.shape[1], x.shape[2] // num_heads
    if layers > _MAX_LAYERS:
        return f"the kernels take up to {_MAX_LAYERS} layers, x has {layers}"
    if head_dim > _MAX_HEAD_DIM:
        return f"the kernels take heads of up to {_MAX_HEAD_DIM} channels, x has {head_dim}"
    return None


def _prepare(x, qkv_weight, qkv_bias, seed, num_heads, dropout_p, compute_dtype, backend) -> torch.dtype:
    """Check a direct call of an operator; the dtype that it computes in."""
    _check(x, qkv_weight, qkv_bias, seed, num_heads, dropout_p, compute_dtype)
    if dropout_p > 0.0 and seed is None:
        raise ValueError("seed: expected an int64 tensor of shape (1,) with dropout_p > 0, got None")
    dtype = compute_dtype or x.dtype
    backends.require("lca", backend, x, dtype, _limit(x, num_heads))
    return dtype


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


@torch.library.impl("ceit::lca", "default")
def _forward(x, qkv_weight, qkv_bias, seed, num_heads, scale, dropout_p, compute_dtype, backend):
    dtype = _prepare(x, qkv_weight, qkv_bias, seed, num_heads, dropout_p, compute_dtype, backend)
    if x.shape[0] == 0:
        return x.new_empty((0, 1, x.shape[2]), dtype=dtype)
    from .triton.launch import lca_forward_triton

    return lca_forward_triton(*_contiguous(x, qkv_weight, qkv_bias, seed), num_heads, scale, dropout_p, dtype)


@torch.library.register_fake("ceit::lca")
def _forward_fake(x, qkv_weight, qkv_bias, seed, num_heads, scale, dropout_p, compute_dtype, backend):
    _check(x, qkv_weight, qkv_bias, seed, num_heads, dropout_p, compute_dtype)
    return x.new_empty((x.shape[0], 1, x.shape[2]), dtype=compute_dtype or x.dtype)


def _empty_gradients(make, x, qkv_weight, qkv_bias, need_input, need_weight) -> tuple[Tensor, ...]:
    """Gradients of the right shape; one that is not needed has no element, because an operator must return tensors."""
    needed = ((x, need_input), (qkv_weight, need_weight), (qkv_bias, need_weight and qkv_bias is not None))
    return tuple(
        make(tensor, memory_format=torch.contiguous_format) if need else x.new_empty(0) for tensor, need in needed
    )


@torch.library.impl("ceit::lca_backward", "default")
def _backward(
    grad_out, x, qkv_weight, qkv_bias, seed,
    num_heads, scale, dropout_p, compute_dtype, need_input, need_weight, backend,
):  # fmt: skip
    dtype = _prepare(x, qkv_weight, qkv_bias, seed, num_heads, dropout_p, compute_dtype, backend)
    check_shape("grad_out", grad_out, x.shape[0], 1, x.shape[2])
    if x.shape[0] == 0:
        return _empty_gradients(torch.zeros_like, x, qkv_weight, qkv_bias, need_input, need_weight)
    from .triton.launch import lca_backward_triton

    tensors = _contiguous(grad_out, x, qkv_weight, qkv_bias, seed)
    grads = lca_backward_triton(*tensors, num_heads, scale, dropout_p, dtype, need_input, need_weight)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("ceit::lca_backward")
def _backward_fake(
    grad_out, x, qkv_weight, qkv_bias, seed,
    num_heads, scale, dropout_p, compute_dtype, need_input, need_weight, backend,
):  # fmt: skip
    return _empty_gradients(torch.empty_like, x, qkv_weight, qkv_bias, need_input, need_weight)


def _setup_context(ctx, inputs, output):
    x, qkv_weight, qkv_bias, seed, *ctx.settings = inputs
    ctx.save_for_backward(x, qkv_weight, qkv_bias, seed)


def _autograd_backward(ctx, grad_out):
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    *settings, backend = ctx.settings
    grad_x, grad_weight, grad_bias = torch.ops.ceit.lca_backward(
        grad_out, *ctx.saved_tensors, *settings, need_x, need_weight or need_bias, backend
    )
    no_gradient = (None,) * 6  # seed, num_heads, scale, dropout_p, compute_dtype, backend
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
        *no_gradient,
    )


torch.library.register_autograd("ceit::lca", _autograd_backward, setup_context=_setup_context)
refuse_gradient(
    "ceit::lca_backward",
    "ceit_kernels.lca_attention is differentiable once; for second derivatives run it under "
    'ceit_kernels.use_backend("reference")',
)
loop_over_batch("ceit::lca_backward")


@register_autocast("ceit::lca")
def _autocast(dtype, x, qkv_weight, qkv_bias, seed, num_heads, scale, dropout_p, compute_dtype, backend):
    # The kernels round what they load, so autocast costs no cast of its own.
    compute_dtype = compute_dtype or (None if x.dtype == torch.float64 else dtype)
    return torch.ops.ceit.lca(x, qkv_weight, qkv_bias, seed, num_heads, scale, dropout_p, compute_dtype, backend)


# What is computed, which is less than plain PyTorch computes: W_k is multiplied into the query, W_v into the sum.


@register_flops("ceit::lca")
def _flops(x, qkv_weight, qkv_bias, seed, num_heads, *rest, out_shape, **options):
    batch, layers, channels = x
    return 3 * matmul_flops(batch, channels, channels) + 2 * matmul_flops(batch * num_heads, layers, channels)


@register_flops("ceit::lca_backward")
def _backward_flops(grad_out, x, qkv_weight, qkv_bias, seed, num_heads, *rest, out_shape, **options):
    *_, need_input, need_weight, _ = rest
    batch, layers, channels = x
    # The query again, with W_k and W_v what scores and probabilities are products of, and the query's gradient.
    flops = 4 * matmul_flops(batch, channels, channels) + 3 * matmul_flops(batch * num_heads, layers, channels)
    if need_input:
        flops += matmul_flops(batch, channels, channels) * 3 + 2 * matmul_flops(batch * num_heads, layers, channels)
    if need_weight:
        flops += matmul_flops(batch, channels, channels) * 3 + 2 * matmul_flops(batch * num_heads, layers, channels)
    return flops
