"""``ceit::i2t`` and its backward: schema, checks, autograd, autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..common.checks import check_device, check_dtype, check_floating, check_shape
from ..common.flops import conv_backward_flops, conv_flops, register_flops
from ..common.registration import loop_over_batch, refuse_gradient, register_autocast
from .cpu import i2t_backward_cpu, i2t_forward_cpu
from .cuda import OUT_CHANNELS, i2t_backward_cuda, i2t_forward_cuda, pooled_size

__all__ = ["MAX_IN_CHANNELS", "OUT_CHANNELS", "size_limit"]

MAX_IN_CHANNELS = 4

# With mean and variance they are BatchNorm's; without, the call's own are used and returned. The second result are the
# places of the maxima in their windows, empty if nothing asks for them. The last is the map before its norm (B, H', W',
# channels), which backward needs on the CPU where the statistics are the call's own; empty elsewhere.
torch.library.define(
    "ceit::i2t",
    "(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? variance, float eps, "
    "bool need_indices, ScalarType? compute_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "ceit::i2t_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor indices, Tensor mean, "
    "Tensor variance, float eps, bool training, ScalarType? compute_dtype, bool need_input, str backend, "
    "Tensor? pooled=None) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _on_cpu(x: Tensor) -> bool:
    """Whether the code for the CPU serves a tensor."""
    return backends.native_operator("i2t", x) == "_i2t_forward_cpu"


def size_limit(x: Tensor, out_channels: int) -> str | None:
    """Why sizes are beyond the kernels, if they are."""
    kernels = not _on_cpu(x)
    if kernels and x.shape[1] > MAX_IN_CHANNELS:
        return f"the kernels take images of up to {MAX_IN_CHANNELS} channels, x has {x.shape[1]}"
    if kernels and out_channels not in OUT_CHANNELS:
        return f"the kernels give {OUT_CHANNELS} channels, not {out_channels}"
    if x.shape[0] == 0:
        return "the batch is empty"
    return None


def _check(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    compute_dtype: torch.dtype | None,
) -> None:
    check_shape("x", x, "B", "I", "H", "W")
    check_floating("x", x)
    if 0 in x.shape[1:]:
        raise ValueError(f"x: expected images with at least one pixel and channel, got {tuple(x.shape)}")
    check_shape("weight", weight, "O", x.shape[1], 7, 7)
    check_floating("weight", weight)
    check_device("weight", weight, x, "x")
    if compute_dtype is None:
        check_dtype("weight", weight, x.dtype, "x")
    for name, tensor in (("gamma", gamma), ("beta", beta), ("mean", mean), ("variance", variance)):
        if tensor is not None:
            check_shape(name, tensor, weight.shape[0])
            check_floating(name, tensor)
            check_device(name, tensor, x, "x")
    if (mean is None) != (variance is None):
        raise ValueError("variance: expected with mean, or neither")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What statistics are kept in."""
    return torch.promote_types(dtype, torch.float32)


def _prepare(x, weight, gamma, beta, mean, variance, compute_dtype, backend) -> torch.dtype:
    """Check a direct call of an operator; the dtype that it computes in."""
    _check(x, weight, gamma, beta, mean, variance, compute_dtype)
    dtype = compute_dtype or x.dtype
    backends.require("i2t", backend, x, dtype, size_limit(x, weight.shape[0]))
    return dtype


@torch.library.impl("ceit::i2t", "default")
def _forward(x, weight, gamma, beta, mean, variance, eps, need_indices, compute_dtype, backend):
    dtype = _prepare(x, weight, gamma, beta, mean, variance, compute_dtype, backend)
    forward = i2t_forward_cpu if _on_cpu(x) else i2t_forward_cuda
    arguments = (x, weight, gamma, beta, mean, variance, eps, need_indices, dtype)
    out, indices, new_mean, new_variance, pooled = forward(*arguments)
    pooled = out.new_empty(0) if pooled is None else pooled
    if mean is None:
        return out, indices, new_mean, new_variance, pooled
    return out, indices, new_mean.new_empty(0), new_mean.new_empty(0), pooled


@torch.library.register_fake("ceit::i2t")
def _forward_fake(x, weight, gamma, beta, mean, variance, eps, need_indices, compute_dtype, backend):
    _check(x, weight, gamma, beta, mean, variance, compute_dtype)
    dtype, training = compute_dtype or x.dtype, mean is None
    statistics = _wide(dtype)
    size = (x.shape[0], pooled_size(x.shape[2]), pooled_size(x.shape[3]), weight.shape[0])
    indices = x.new_empty(size, dtype=torch.uint8).permute(0, 3, 1, 2) if training or need_indices else None
    mean, variance = (x.new_empty(weight.shape[0] if training else 0, dtype=statistics) for _ in range(2))
    out = x.new_empty(size, dtype=dtype).permute(0, 3, 1, 2)
    pooled = x.new_empty(size if training and need_indices and _on_cpu(x) else 0, dtype=dtype)
    return out, x.new_empty(0, dtype=torch.uint8) if indices is None else indices, mean, variance, pooled


@torch.library.impl("ceit::i2t_backward", "default")
def _backward(
    grad_out, x, weight, gamma, beta, indices, mean, variance, eps, training, compute_dtype, need_input, backend,
    pooled=None,
):  # fmt: skip
    dtype = _prepare(x, weight, gamma, beta, mean, variance, compute_dtype, backend)
    height, width = pooled_size(x.shape[2]), pooled_size(x.shape[3])
    check_shape("grad_out", grad_out, x.shape[0], weight.shape[0], height, width)
    check_shape("indices", indices, x.shape[0], weight.shape[0], height, width)
    check_dtype("indices", indices, torch.uint8, "the forward's")
    if pooled is not None:
        check_shape("pooled", pooled, x.shape[0], height, width, weight.shape[0])
        check_dtype("pooled", pooled, dtype, "the forward's")
    arguments = [grad_out, x, weight, gamma, indices, mean, variance, eps, training, need_input, dtype]
    if _on_cpu(x):
        if training and pooled is None:
            raise ValueError("pooled: expected the forward's, which the code for the CPU reads in training")
        grads = i2t_backward_cpu(*arguments, pooled)
    else:
        grads = i2t_backward_cuda(*arguments)
    grad_x, grad_weight, grad_gamma, grad_beta = grads
    return (
        x.new_empty(0) if grad_x is None else grad_x,
        grad_weight.to(weight.dtype),
        x.new_empty(0) if gamma is None else grad_gamma.to(gamma.dtype),
        x.new_empty(0) if beta is None else grad_beta.to(beta.dtype),
    )


@torch.library.register_fake("ceit::i2t_backward")
def _backward_fake(
    grad_out, x, weight, gamma, beta, indices, mean, variance, eps, training, compute_dtype, need_input, backend,
    pooled=None,
):  # fmt: skip
    def like(tensor):
        return x.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return like(x if need_input else None), like(weight), like(gamma), like(beta)


def _setup_context(ctx, inputs, output):
    x, weight, gamma, beta, mean, variance, ctx.eps, _, ctx.compute_dtype, ctx.backend = inputs
    _, indices, new_mean, new_variance, pooled = output
    ctx.training = mean is None
    statistics = (new_mean, new_variance) if ctx.training else (mean, variance)
    # Otherwise zeros as large as the indices would be made for every backward.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(indices, new_mean, new_variance, pooled)
    ctx.save_for_backward(x, weight, gamma, beta, indices, *statistics, pooled if ctx.training and _on_cpu(x) else None)


def _autograd_backward(ctx, grad_out, *no_grads):
    x, weight, gamma, beta, indices, mean, variance, pooled = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    no_gradient = (None,) * 6  # mean, variance, eps, need_indices, compute_dtype, backend
    if grad_out is None:
        return (None,) * 4 + no_gradient
    if indices.numel() == 0:
        raise RuntimeError("ceit::i2t: a gradient needs a forward with need_indices=True")
    grads = torch.ops.ceit.i2t_backward(
        grad_out, x, weight, gamma, beta, indices, mean, variance,
        ctx.eps, ctx.training, ctx.compute_dtype, needed[0], ctx.backend, pooled,
    )  # fmt: skip
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *no_gradient)


torch.library.register_autograd("ceit::i2t", _autograd_backward, setup_context=_setup_context)
refuse_gradient(
    "ceit::i2t_backward",
    "ceit_kernels.FusedImage2Tokens is differentiable once; for second derivatives run it under "
    'ceit_kernels.use_backend("reference")',
)
loop_over_batch("ceit::i2t_backward")


@register_autocast("ceit::i2t")
def _autocast(dtype, x, weight, gamma, beta, mean, variance, eps, need_indices, compute_dtype, backend):
    # The kernels round what they load, so autocast costs no cast of its own.
    compute_dtype = compute_dtype or (None if x.dtype == torch.float64 else dtype)
    return torch.ops.ceit.i2t(x, weight, gamma, beta, mean, variance, eps, need_indices, compute_dtype, backend)


def _convolved(x, weight) -> tuple[int, ...]:
    return (x[0], weight[0], *((size + 1) // 2 for size in x[2:]))


@register_flops("ceit::i2t")
def _flops(x, weight, *rest, out_shape, **options):
    return conv_flops(x, weight, _convolved(x, weight))


@register_flops("ceit::i2t_backward")
def _backward_flops(grad_out, x, weight, *rest, out_shape, **options):
    need_input = rest[8]
    return conv_backward_flops(x, weight, _convolved(x, weight), need_input, True)
