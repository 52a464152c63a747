"""``ceit::lca`` and its gradient."""

from __future__ import annotations

import torch

from ..common.checks import check_device, check_dtype, check_floating, check_parameters, check_shape
from ..common.flops import matmul_flops
from ..common.operator import Operator, contiguous, gradients_like
from .cpu import lca_backward_cpu, lca_forward_cpu

__all__ = ["lca_operator"]

_MAX_LAYERS, _MAX_HEAD_DIM = 128, 256


class _LCA(Operator):
    # The results behind the first are what backward reads on the CPU; Triton's computes them again.
    name = "lca"
    schema = (
        "(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor? seed, int num_heads, float scale, float dropout_p, "
        "bool need_saved, ScalarType? compute_dtype, str backend) "
        "-> (Tensor out, Tensor q, Tensor absorbed, Tensor probabilities, Tensor attended)"
    )
    backward_schema = (
        "(Tensor grad_out, Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor? seed, Tensor? q, Tensor? absorbed, "
        "Tensor? probabilities, Tensor? attended, int num_heads, float scale, float dropout_p, "
        "ScalarType? compute_dtype, bool need_input, bool need_weight, str backend) -> (Tensor, Tensor, Tensor)"
    )
    public_name = "ceit_kernels.lca_attention"

    def check(self, x, qkv_weight, qkv_bias, seed, num_heads, scale, dropout_p, need_saved, compute_dtype):
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
        if qkv_bias is not None:
            check_shape("qkv_bias", qkv_bias, 3 * channels)
        check_parameters(x, compute_dtype, qkv_weight=qkv_weight, qkv_bias=qkv_bias)
        if seed is not None:
            check_shape("seed", seed, 1)
            check_dtype("seed", seed, torch.int64, "every seed")
            check_device("seed", seed, x, "x")
        elif dropout_p > 0.0:
            raise ValueError("seed: expected an int64 tensor of shape (1,) with dropout_p > 0, got None")

    def unsupported(self, x, qkv_weight, qkv_bias, seed, num_heads, *settings):
        layers, head_dim = x.shape[1], x.shape[2] // num_heads
        if layers > _MAX_LAYERS:
            return f"the kernels take up to {_MAX_LAYERS} layers, x has {layers}"
        if head_dim > _MAX_HEAD_DIM:
            return f"the kernels take heads of up to {_MAX_HEAD_DIM} channels, x has {head_dim}"
        return None

    def forward(self, *inputs):
        *tensors, num_heads, scale, dropout_p, need_saved, _, backend = inputs
        settings = num_heads, scale, dropout_p, self.compute_dtype(*inputs)
        if tensors[0].shape[0] == 0:
            return self.fake(*inputs)
        if backend == "native":
            out, *saved = lca_forward_cpu(*tensors, *settings)
            return out, *(saved if need_saved else (None,) * 4)
        from .triton.launch import lca_forward_triton

        return lca_forward_triton(*contiguous(*tensors), *settings), None, None, None, None

    def fake(self, *inputs):
        (x, *_, num_heads, _, _, need_saved, _, backend), dtype = inputs, self.compute_dtype(*inputs)
        batch, layers, channels = x.shape
        out = x.new_empty((batch, 1, channels), dtype=dtype)
        if not (need_saved and backend == "native"):
            return out, None, None, None, None
        return (
            out,
            x.new_empty((batch, channels), dtype=dtype),
            x.new_empty((num_heads, batch, channels), dtype=dtype),
            x.new_empty((batch, num_heads, layers), dtype=torch.promote_types(dtype, torch.float32)),
            x.new_empty((batch, num_heads, channels), dtype=dtype),
        )

    # What is computed, which is less than plain PyTorch computes: W_k is multiplied into the query, W_v into the sum.
    def flops(self, x, qkv_weight, qkv_bias, seed, num_heads, *rest, **options):
        batch, layers, channels = x
        return 3 * matmul_flops(batch, channels, channels) + 2 * matmul_flops(batch * num_heads, layers, channels)

    def save(self, ctx, inputs, results):
        *tensors, num_heads, scale, dropout_p, ctx.has_saved, compute_dtype, ctx.backend = inputs
        ctx.save_for_backward(*tensors, *results[1:])
        ctx.settings = num_heads, scale, dropout_p, compute_dtype

    def gradients(self, backward, ctx, grad_out, *_):
        if not ctx.has_saved:
            raise RuntimeError("ceit::lca: expected need_saved=True where a gradient is taken, got False")
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        needs = need_x, need_weight or need_bias
        return backward(grad_out, *ctx.saved_tensors, *ctx.settings, *needs, ctx.backend)

    def check_backward(self, grad_out, *inputs):
        x, *parameters, seed, q, _, _, _, num_heads, scale, dropout_p, compute_dtype, _, _, backend = inputs
        self.check(x, *parameters, seed, num_heads, scale, dropout_p, True, compute_dtype)
        check_shape("grad_out", grad_out, x.shape[0], 1, x.shape[2])
        if backend == "native" and q is None:
            raise ValueError("q: expected the forward's, which the code for the CPU reads, got None")

    def backward(self, *inputs):
        *tensors, num_heads, scale, dropout_p, compute_dtype, need_input, need_weight, backend = inputs
        grad_out, x, *parameters, seed = tensors[:5]
        settings = num_heads, scale, dropout_p, compute_dtype or x.dtype, need_input, need_weight
        if x.shape[0] == 0:
            return gradients_like((x, *parameters), (need_input, need_weight, need_weight), torch.zeros_like)
        if backend == "native":
            return lca_backward_cpu(*tensors, *settings)
        from .triton.launch import lca_backward_triton

        return lca_backward_triton(*contiguous(grad_out, x, *parameters, seed), *settings)

    def fake_backward(self, grad_out, x, qkv_weight, qkv_bias, *rest):
        *_, need_input, need_weight, _ = rest
        return gradients_like((x, qkv_weight, qkv_bias), (need_input, need_weight, need_weight))

    def backward_flops(self, grad_out, x, *rest, **options):
        *_, num_heads, _, _, _, need_input, need_weight, _ = rest
        batch, layers, channels = x
        per_weight = matmul_flops(batch, channels, channels)
        per_head = matmul_flops(batch * num_heads, layers, channels)
        # The query again, with W_k and W_v what scores and probabilities are matmuls of, and the query's gradient.
        flops = 4 * per_weight + 3 * per_head
        return flops + (need_input + need_weight) * (3 * per_weight + 2 * per_head)


lca_operator = _LCA()
