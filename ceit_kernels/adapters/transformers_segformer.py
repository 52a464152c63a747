"""The attention and the decode head of transformers' SegFormer (https://arxiv.org/abs/2105.15203).

The head's convolution runs before upsampling: a 1x1 convolution of upsampled maps is the sum of the upsampled 1x1
convolutions of each. At the maps' own sizes it takes a third of the multiply-adds, and neither the upsampled maps nor
their concatenation reach memory. At inference all of the head is one call, see ``segmentation_head``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..common.calls import unsupported_reason
from ..common.children import ANY, children_reason, convolution_reason, held, library_of
from ..common.module import Fusion, attributes_of
from ..linear.functional import linear_layer
from .attention import InferenceAttention
from .segmentation_head import classify_maps

__all__ = ["IDLE_OPTIONS", "SegformerAttention", "SegformerDecodeHead", "attends_to_all"]

# Of stages and what is in them, which do nothing there.
IDLE_OPTIONS = frozenset({"output_hidden_states"})


class SegformerDecodeHead(Fusion, attributes_of(nn.Module)):
    """On the CPU, where linear layers have kernels."""

    def forward(self, encoder_hidden_states: Sequence[Tensor], **kwargs: Any) -> Tensor:
        """Maps (B, C, H, W) of each stage -> (B, labels, H, W) of the first one's size."""
        out = None if kwargs else self._reordered(encoder_hidden_states)
        return super().forward(encoder_hidden_states, **kwargs) if out is None else out

    def _reordered(self, encoder_hidden_states: Sequence[Tensor]) -> Tensor | None:
        """The logits; None for a call that is left to the plain ``forward``, as all are that run on a GPU."""
        projections = list(self.get_submodule(self._projections()).children())
        weight: Any = None
        reason = self.plain_reason()
        if reason is None:
            weight = held(self.get_submodule("linear_fuse"), "weight")
            reason = unsupported_reason(*encoder_hidden_states, weight)
        if reason is None and not all(x.dim() == 4 and x.dtype == weight.dtype for x in encoder_hidden_states):
            reason = "the maps are no images (B, C, H, W) in the dtype of the weights"
        if len(encoder_hidden_states) != len(projections):
            reason = reason or f"there are {len(encoder_hidden_states)} maps for {len(projections)} projections"
        if reason is not None:
            backends.leave_to_reference("linear", reason)
            return None
        if backends.choose("linear", weight, weight.dtype).backend == "reference":
            return None
        if (out := classify_maps(self, projections, encoder_hidden_states)) is not None:
            return out
        size = encoder_hidden_states[0].shape[2:]
        parts = weight.flatten(1).chunk(len(projections), dim=1)[::-1]
        total: Any = 0
        for x, projection, part in zip(encoder_hidden_states, projections, parts, strict=True):
            tokens = linear_layer(projection(x), part.contiguous(), None)
            image = tokens.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
            total = total + (image if x.shape[2:] == size else F.interpolate(image, size, mode="bilinear"))
        for name in ("batch_norm", "activation", "dropout", "classifier"):
            total = self.get_submodule(name)(total)
        return total

    def _projections(self) -> str:
        return "linear_c" if "linear_c" in self._modules else "linear_projections"  # in transformers 4 and 5

    def plain_reason(self) -> str | None:
        """As of ``Fusion``."""
        called = (self._projections(), "batch_norm", "activation", "dropout", "classifier")
        reason = children_reason(self, {**dict.fromkeys(called, ANY), "linear_fuse": (nn.Conv2d,)})
        if reason is not None:
            return reason
        convolution = self.get_submodule("linear_fuse")
        reason = convolution_reason("linear_fuse", convolution, (1, 1), (0, 0))
        if convolution.bias is not None or convolution.kernel_size != (1, 1):
            return reason or "linear_fuse is no pointwise convolution without a bias"
        return reason


def attends_to_all(module: Any) -> bool:
    """Whether transformers 5 gives a module's attention its own function, of all queries to all keys."""
    name = module.config._attn_implementation
    library = sys.modules["transformers.models.segformer.modeling_segformer"]
    # Users register functions of their own under any name; wrappers copy the name of their module.
    function = library.ALL_ATTENTION_FUNCTIONS.get(name)
    if name == "eager":
        return function is None and library_of(library.eager_attention_forward) == "transformers"
    own = getattr(function, "__module__", None) == "transformers.integrations.sdpa_attention"
    return name == "sdpa" and own and library_of(function) == "transformers" and not module.is_causal


class SegformerAttention(InferenceAttention):
    """That of transformers 5, of all tokens to those of a smaller image."""

    def plain_reason(self: Any) -> str | None:
        """As of ``Fusion``."""
        if "q_proj" not in self._modules:
            return "its parts are those of transformers 4"
        return super().plain_reason()

    def _uses_sdpa(self: Any) -> bool:
        return self.config._attn_implementation == "sdpa" and attends_to_all(self)

    def forward(
        self: Any, hidden_states: Tensor, height: int, width: int, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, C) of an image of height x width -> (B, N, C), and no weights."""
        # With `output_hidden_states`, as all calls for segmentation have, the model captures them around its parts.
        is_plain = attention_mask is not None or any(
            value is not None and value is not False for name, value in kwargs.items() if name not in IDLE_OPTIONS
        )
        if is_plain or not self._serves(hidden_states):
            return super().forward(hidden_states, height, width, attention_mask, **kwargs)
        source = hidden_states
        if self.sequence_reduction_ratio > 1:
            source = self.sequence_reduction(hidden_states, height, width)
        q, k, v = (
            projection(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for projection, x in ((self.q_proj, hidden_states), (self.k_proj, source), (self.v_proj, source))
        )
        return self.o_proj(self._attend(q, k, v, None, self.scaling)), None
