"""A decode head at inference on the CPU: projections of maps, upsampled, added, normed, and classified in one call.

What is linear is one layer: a projection, the part of the 1x1 convolution of the concatenated maps that reads it, and
the norm behind that. It is made of the weights in every call, which takes as many multiply-adds as a few hundred
pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..common.autocast import autocast_dtype
from ..common.calls import are_eager, needs_gradient, unsupported_reason
from ..common.children import Classes, child_reason, children_reason, convolution_reason, held
from ..common.matmul import linear
from ..leff.activations import INDICES, MODULES, activation_name
from ..leff.norms import of_module
from ..linear.module import LINEAR

__all__ = ["classify_maps"]

torch.library.define(
    "ceit::_segmentation_head",
    "(Tensor x, Tensor?[] projection, Tensor?[] maps, int activation, Tensor?[] classifier) -> Tensor",
)

_MOST_MAPS = 8  # of the compiled code
_PROJECTION: Classes = ("transformers.models.segformer.modeling_segformer.SegformerMLP",)


def classify_maps(head: Any, projections: Sequence[Any], maps: Sequence[Tensor]) -> Tensor | None:
    """The logits (B, L, H, W) of maps (B, C, H, W), the first of which is the largest; None if it is not served.

    Args:
        head: with ``linear_fuse``, whose tensors may be read, ``batch_norm``, ``activation``, ``dropout`` and
            ``classifier``.
        projections: of each map.
    """
    is_known = len(maps) <= _MOST_MAPS and _reason(head, projections) is None
    norm = of_module(head.batch_norm) if is_known else None
    if norm is None or norm.training or norm.running_mean is None or norm.running_var is None:
        return None
    fuse, classifier = held(head.linear_fuse, "weight"), head.classifier
    last = held(classifier, "weight"), held(classifier, "bias")
    layers: list[Any] = [(held(each.proj, "weight"), held(each.proj, "bias")) for each in projections]
    of_norm = norm.weight, norm.bias, norm.running_mean, norm.running_var
    tensors = [*maps, fuse, *last, *of_norm, *(tensor for layer in layers for tensor in layer)]
    if not _are_served([tensor for tensor in tensors if tensor is not None]):
        return None
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean
    projected = []
    # The convolution reads the maps in reverse.
    parts = fuse.flatten(1).chunk(len(maps), dim=1)[::-1]
    for (weight, bias), part in zip(layers, parts, strict=True):
        shift = shift if bias is None else shift + part @ bias
        projected.append((part @ weight) * scale[:, None])
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias
    images = [x.permute(0, 2, 3, 1).contiguous() for x in maps]
    added = [
        linear(x.view(-1, x.shape[3]), weight).view(*x.shape[:3], -1)
        for x, weight in zip(images[1:], projected[1:], strict=True)
    ]
    activation = INDICES[str(activation_name(head.activation))]
    out = torch.ops.ceit._segmentation_head(images[0], [projected[0], shift], added, activation, last)
    return out.permute(0, 3, 1, 2)  # channels-last, as the plain head's


def _reason(head: Any, projections: Sequence[nn.Module]) -> str | None:
    """Why the children have to be called."""
    children = head._modules
    reason = child_reason("batch_norm", children["batch_norm"], (nn.BatchNorm2d,))
    reason = reason or child_reason("activation", children["activation"], MODULES)
    reason = reason or child_reason("dropout", children["dropout"], (nn.Dropout, nn.Identity))
    reason = reason or child_reason("classifier", children["classifier"], (nn.Conv2d,))
    for each in projections:
        reason = reason or child_reason("a projection", each, _PROJECTION) or children_reason(each, {"proj": LINEAR})
    if reason is not None:
        return reason
    classifier, dropout = children["classifier"], children["dropout"]
    if activation_name(children["activation"]) is None or classifier.kernel_size != (1, 1):
        return "the kernels do not know its activation or its classifier"
    if dropout.training and getattr(dropout, "p", 0):
        return "the dropout is not idle"
    return convolution_reason("classifier", classifier, (1, 1), (0, 0))


def _are_served(tensors: Sequence[Tensor]) -> bool:
    x = tensors[0]
    return (
        x.is_cpu
        and all(tensor.numel() and (tensor.dtype, tensor.device) == (x.dtype, x.device) for tensor in tensors)
        and not needs_gradient(*tensors)
        and are_eager(tensors)
        and unsupported_reason(*tensors) is None
        and autocast_dtype(x) is None
        and backends.choose("linear", x, x.dtype).backend == "native"
    )
