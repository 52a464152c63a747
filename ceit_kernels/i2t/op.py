"""``ceit::i2t`` and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..common.checks import check_device, check_dtype, check_floating, check_parameters, check_shape
from ..common.flops import conv_backward_flops, conv_flops
from ..common.operator import Operator, gradients_like
from .arguments import Stem, conv_size, pooled_size
from .cpu import i2t_backward_cpu, i2t_forward_cpu
from .cuda import OUT_CHANNELS, i2t_backward_cuda, i2t_forward_cuda

__all__ = [
    "MAX_IN_CHANNELS",
    "OUT_CHANNELS",
    "group_unsupported_reason",
    "i2t_operator",
    "on_cpu",
    "size_unsupported_reason",
]

MAX_IN_CHANNELS = 4


def on_cpu(x: Tensor) -> bool:
    """Whether the code for the CPU serves a tensor."""
    return backends.compiled_operator("i2t", x) == "_i2t_forward_cpu"


def size_unsupported_reason(x: Tensor, out_channels: int) -> str | None:
    """Why sizes are beyond the kernels, if they are."""
    if x.shape[0] == 0:
        return "the batch is empty"
    if on_cpu(x):
        return None
    if x.shape[1] > MAX_IN_CHANNELS:
        return f"the kernels take images of up to {MAX_IN_CHANNELS} channels, x has {x.shape[1]}"
    if out_channels not in OUT_CHANNELS:
        return f"the kernels give {OUT_CHANNELS} channels, not {out_channels}"
    return None


def group_unsupported_reason(x: Tensor, group: str | None) -> str | None:
    """Why statistics over processes are beyond the kernels, if they are."""
    return None if group is None or on_cpu(x) else "the kernels for GPUs take statistics of one process alone"


class _I2T(Operator):
    """An eager call on a GPU may pass ``Running`` behind the arguments, which the call averages."""

    # With mean and variance they are BatchNorm's; without, the call's own are used and returned. The second result are
    # the places of the maxima in their windows, if something asks for them. The last is the map before its norm (B, H',
    # W', channels), which backward needs on the CPU where the statistics are the call's own. A group, of processes that
    # share these statistics, is for the CPU alone.
    name = "i2t"
    schema = (
        "(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? variance, float eps, "
        "bool need_indices, ScalarType? compute_dtype, str? group, str backend) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    backward_schema = (
        "(Tensor grad_out, Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor indices, Tensor mean, "
        "Tensor variance, float eps, bool training, ScalarType? compute_dtype, bool need_input, str backend, "
        "Tensor? pooled=None, str? group=None) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    public_name = "ceit_kernels.FusedImage2Tokens"

    def check(self, x, weight, gamma, beta, mean, variance, eps, need_indices, compute_dtype, group=None):
        check_shape("x", x, "B", "I", "H", "W")
        check_floating("x", x)
        if 0 in x.shape[1:]:
            raise ValueError(f"x: expected images with at least one pixel and channel, got {tuple(x.shape)}")
        check_shape("weight", weight, "O", x.shape[1], 7, 7)
        check_parameters(x, compute_dtype, weight=weight)
        for name, tensor in (("gamma", gamma), ("beta", beta), ("mean", mean), ("variance", variance)):
            if tensor is not None:
                check_shape(name, tensor, weight.shape[0])
                check_floating(name, tensor)
                check_device(name, tensor, x, "x")
        if (mean is None) != (variance is None):
            raise ValueError("variance: expected with mean, or neither")

    def unsupported(self, x, weight, *rest):
        return size_unsupported_reason(x, weight.shape[0]) or group_unsupported_reason(x, rest[-1])

    def forward(self, x, *rest):
        (*stem, need_indices, compute_dtype, group), running = rest[:9], rest[10:]
        call = x, Stem(*stem), need_indices, compute_dtype or x.dtype
        return i2t_forward_cpu(*call, group) if on_cpu(x) else i2t_forward_cuda(*call, *running)

    def fake(self, x, weight, gamma, beta, mean, variance, eps, need_indices, compute_dtype, group, backend):
        dtype, training = compute_dtype or x.dtype, mean is None
        size = (x.shape[0], pooled_size(x.shape[2]), pooled_size(x.shape[3]), weight.shape[0])
        indices = x.new_empty(size, dtype=torch.uint8).permute(0, 3, 1, 2) if training or need_indices else None
        statistics = (None, None)
        if training:
            acc_dtype = torch.promote_types(dtype, torch.float32)
            statistics = (x.new_empty(weight.shape[0], dtype=acc_dtype) for _ in range(2))
        pooled = x.new_empty(size, dtype=dtype) if training and need_indices and on_cpu(x) else None
        return x.new_empty(size, dtype=dtype).permute(0, 3, 1, 2), indices, *statistics, pooled

    def flops(self, x, weight, *rest, **options):
        return conv_flops(x, weight, _convolved(x, weight))

    def save(self, ctx, inputs, results):
        x, weight, gamma, beta, mean, variance, ctx.eps, ctx.has_indices, ctx.compute_dtype, *rest = inputs
        ctx.group, ctx.backend = rest[:2]
        _, indices, new_mean, new_variance, pooled = results
        ctx.training = mean is None
        statistics = (new_mean, new_variance) if ctx.training else (mean, variance)
        pooled = pooled if ctx.training and on_cpu(x) else None
        ctx.save_for_backward(x, weight, gamma, beta, indices, *statistics, pooled)

    def gradients(self, backward, ctx, grad_out, *_):
        if not ctx.has_indices:
            raise RuntimeError("ceit::i2t: a gradient needs a forward with need_indices=True")
        *tensors, pooled = ctx.saved_tensors
        settings = ctx.eps, ctx.training, ctx.compute_dtype, ctx.needs_input_grad[0], ctx.backend
        return backward(grad_out, *tensors, *settings, pooled, ctx.group)

    def check_backward(
        self, grad_out, x, weight, gamma, beta, indices, mean, variance, eps, training, compute_dtype, need_input,
        backend, pooled=None, group=None,
    ):  # fmt: skip
        self.check(x, weight, gamma, beta, mean, variance, eps, True, compute_dtype)
        height, width = pooled_size(x.shape[2]), pooled_size(x.shape[3])
        check_shape("grad_out", grad_out, x.shape[0], weight.shape[0], height, width)
        check_shape("indices", indices, x.shape[0], weight.shape[0], height, width)
        check_dtype("indices", indices, torch.uint8, "the forward's")
        if pooled is not None:
            check_shape("pooled", pooled, x.shape[0], height, width, weight.shape[0])
            check_dtype("pooled", pooled, compute_dtype or x.dtype, "the forward's")
        elif training and on_cpu(x):
            raise ValueError("pooled: expected the forward's, which the code for the CPU reads in training")

    def backward(
        self, grad_out, x, weight, gamma, beta, indices, mean, variance, eps, training, compute_dtype, need_input,
        backend, pooled=None, group=None,
    ):  # fmt: skip
        dtype, stem = compute_dtype or x.dtype, Stem(weight, gamma, beta, mean, variance, eps)
        if on_cpu(x):
            pooled = pooled if training else None
            grads = i2t_backward_cpu(grad_out, x, stem, indices, pooled, need_input, dtype, group)
        else:
            grads = i2t_backward_cuda(grad_out, x, stem, indices, training, need_input, dtype)
        likes = (x, weight, gamma, beta)
        return tuple(None if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, likes, strict=True))

    def fake_backward(self, grad_out, x, weight, gamma, beta, *rest):
        need_input = rest[6]
        return gradients_like((x, weight, gamma, beta), (need_input, True, True, True))

    def backward_flops(self, grad_out, x, weight, *rest, **options):
        need_input = rest[8]
        return conv_backward_flops(x, weight, _convolved(x, weight), need_input, True)


def _convolved(x, weight) -> tuple[int, ...]:
    return (x[0], weight[0], *map(conv_size, x[2:]))


i2t_operator = _I2T()
