"""Blocks with attention in other libraries, as the calls that they make, which ``freeze`` makes one call of.

A recipe tells ``convnet.layers.Steps`` what the ``forward`` of a class does; a class is known by its qualified name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.children import child_reason, held, is_patched, qualified_name
from ..common.module import Fusion
from .heads import POOLING
from .transformers_segformer import IDLE_OPTIONS, attends_to_all

if TYPE_CHECKING:
    from ..convnet.layers import Steps

__all__ = ["idle_options", "recipe_of"]

Recipe = Callable[["Steps", str, Any], None]


def _biases(steps: Steps, name: str, module: Any) -> Tensor:
    """Of the scores, by the distance of tokens: (heads, queries, keys)."""
    steps.own(name, module, ("get_attention_biases",))
    return held(module, "attention_biases").detach()[:, held(module, "attention_bias_idxs")]


_OF_BIASES = "attention_biases", "attention_bias_idxs"


def _pre_norm_block(norm1: str, attention: str, norm2: str, mlp: str) -> Recipe:
    """A block of attention and feed-forward, each behind a norm and with a shortcut."""

    def recipe(steps: Steps, name: str, block: Any) -> None:
        steps.only(name, block, (norm1, attention, norm2, mlp))
        for children in ((norm1, attention), (norm2, mlp)):
            with steps.shortcut(name):
                steps.calls(name, block, children)

    return recipe


def _blocks(steps: Steps, name: str, blocks: nn.Module) -> None:
    """Of a list that a module goes over."""
    steps.calls(name, blocks, blocks._modules)


def _pvt_v2_attention(steps: Steps, name: str, module: Any) -> None:
    steps.only(name, module, ("q", "kv", "proj", "sr", "norm"))
    heads, width = module.num_heads, module.head_dim
    x = steps.value
    q = steps.branch(x, name, module, "q")
    steps.branch(x, name, module)
    if module.sr is not None:
        steps.call_on_image(f"{name}.sr", module.sr)
    steps.calls(name, module, ("norm", "kv"))
    kv = steps.value
    scale = width**-0.5 if module.fused_attn else module.scale
    firsts, strides = (0, 0, heads * width), (width, width, width)
    steps.attention(
        name,
        (q, kv, kv),
        heads=heads,
        key_channels=width,
        value_channels=width,
        scale=scale,
        firsts=firsts,
        steps=strides,
    )
    steps.calls(name, module, ("proj",))


def _pvt_v2_embedding(steps: Steps, name: str, module: Any) -> None:
    steps.only(name, module, ("proj", "norm"))
    steps.call(f"{name}.proj", module.proj)
    steps.of_tokens = True
    steps.call(f"{name}.norm", module.norm)


def _pvt_v2_stage(steps: Steps, name: str, module: Any) -> None:
    steps.only(name, module, ("downsample", "blocks", "norm"))
    steps.calls(name, module, ("downsample",))
    _blocks(steps, f"{name}.blocks", module.blocks)
    steps.call(f"{name}.norm", module.norm)
    steps.of_tokens = False


def _segformer_reduction(steps: Steps, name: str, module: Any) -> None:
    steps.only(name, module, ("sequence_reduction", "layer_norm"))
    steps.call_on_image(f"{name}.sequence_reduction", module.sequence_reduction)
    steps.call(f"{name}.layer_norm", module.layer_norm)


def _segformer_attention(steps: Steps, name: str, module: Any) -> None:
    projections = "q_proj", "k_proj", "v_proj"
    steps.only(name, module, (*projections, "o_proj", "sequence_reduction"))
    heads, width = module.num_attention_heads, module.head_dim
    if not attends_to_all(module):
        steps.refuse(f"{name} has an attention of its own")
    steps.conditions.append(partial(attends_to_all, module))  # its config is shared with all the model
    x = steps.value
    q = steps.branch(x, name, module, "q_proj")
    reduced = steps.branch(x, name, module, "sequence_reduction")
    k, v = (steps.branch(reduced, name, module, child) for child in projections[1:])
    steps.attention(
        name,
        (q, k, v),
        heads=heads,
        key_channels=width,
        value_channels=width,
        scale=module.scaling,
        firsts=(0, 0, 0),
        steps=(width, width, width),
    )
    steps.calls(name, module, ("o_proj",))


def _segformer_stage(steps: Steps, name: str, module: Any) -> None:
    steps.only(name, module, ("patch_embeddings", "blocks", "layer_norm"))
    embedding = module.patch_embeddings
    steps.only(f"{name}.patch_embeddings", embedding, ("proj", "layer_norm"))
    if not module.reshape or child_reason(
        "patch_embeddings", embedding, (f"{_SEGFORMER}.SegformerOverlapPatchEmbeddings",)
    ):
        steps.refuse(f"{name} gives no images")
    steps.call(f"{name}.patch_embeddings.proj", embedding.proj)
    steps.of_tokens = True
    steps.call(f"{name}.patch_embeddings.layer_norm", embedding.layer_norm)
    _blocks(steps, f"{name}.blocks", module.blocks)
    steps.call(f"{name}.layer_norm", module.layer_norm)
    steps.of_tokens = False


def _tiny_vit_block(steps: Steps, name: str, block: Any) -> None:
    steps.only(name, block, ("attn", "mlp", "local_conv"))
    attention, window = block.attn, block.window_size
    steps.only(f"{name}.attn", attention, ("norm", "qkv", "proj"), _OF_BIASES)
    reason = child_reason("attn", attention, (type(attention),))
    if recipe_of(attention) is not _inlined or reason is not None:
        steps.refuse(reason or f"{name}.attn is no attention of TinyViT")
    heads, keys, values = attention.num_heads, attention.key_dim, attention.val_dim
    with steps.shortcut(name):
        steps.norm(f"{name}.attn.norm", attention.norm, window)
        steps.calls(f"{name}.attn", attention, ("qkv",))
        qkv, each = steps.value, 2 * keys + values
        steps.attention(
            name,
            (qkv, qkv, qkv),
            heads=heads,
            key_channels=keys,
            value_channels=values,
            scale=keys**-0.5 if attention.fused_attn else attention.scale,
            firsts=(0, keys, 2 * keys),
            steps=(each, each, each),
            bias=_biases(steps, name, attention),
            window=window,
        )
        steps.calls(f"{name}.attn", attention, ("proj",))
    steps.call_on_image(f"{name}.local_conv", block.local_conv)
    with steps.shortcut(name):
        steps.call(f"{name}.mlp", block.mlp)


def _inlined(steps: Steps, name: str, module: Any) -> None:
    """Of a module that the recipe of its parent follows."""
    steps.refuse(f"{name} is called by itself")


def _tiny_vit_stage(steps: Steps, name: str, module: Any) -> None:
    steps.only(name, module, ("downsample", "blocks"))
    steps.calls(name, module, ("downsample",))
    steps.of_tokens = True
    steps.call(f"{name}.blocks", module.blocks)
    steps.of_tokens = False


def _efficientformer_attention(steps: Steps, name: str, module: Any) -> None:
    """With ``stride_conv`` and ``upsample`` of a smaller image; in blocks that make images smaller only queries are."""
    mixes = "talking_head1" in module._modules
    convolutions = "stride_conv", "q", "k", "v", "v_local", "upsample", "act", "proj"
    steps.only(name, module, (*convolutions, "talking_head1", "talking_head2"), _OF_BIASES)
    heads, width, value_width = module.num_heads, module.key_dim, module.d
    bias, mixing = _biases(steps, name, module), None
    if mixes:
        (before, shift), (after, added) = (
            steps.pointwise(f"{name}.{head}", module._modules[head]) for head in ("talking_head1", "talking_head2")
        )
        bias = torch.einsum("ij,jqk->iqk", before, bias.double()) + shift[:, None, None]
        mixing = before, after, added
    steps.calls(name, module, ("stride_conv",))
    x = steps.value
    q, k, v = (steps.branch(x, name, module, child) for child in "qkv")
    attended = steps.attention(
        name,
        (q, k, v),
        heads=heads,
        key_channels=width,
        value_channels=value_width,
        scale=module.scale,
        firsts=(0, 0, 0),
        steps=(width, width, value_width),
        bias=bias,
        mixing=mixing,
    )
    steps.branch(v, name, module, "v_local")
    steps.add(name, attended)
    steps.calls(name, module, ("upsample", "act", "proj"))


def _efficientformer_query(steps: Steps, name: str, module: Any) -> None:
    """A depthwise convolution of stride 2, plus every second pixel: one more for its centre."""
    steps.only(name, module, ("pool", "local", "proj"))
    pool, local = module.pool, module.local
    reason = child_reason("pool", pool, (nn.AvgPool2d,)) or child_reason("local", local, (nn.Conv2d,))
    settings = [
        value if isinstance(value, int) else value[0] for value in (pool.kernel_size, pool.stride, pool.padding)
    ]
    settings.append(getattr(pool, "divisor_override", None))
    if (
        reason
        or settings != [1, 2, 0, None]
        or (local.kernel_size, local.stride, local.padding) != ((3, 3), (2, 2), (1, 1))
    ):
        steps.refuse(reason or f"{name} takes other pixels than every second one")
    weight = held(local, "weight").detach().clone()
    weight[:, :, 1, 1] += 1
    steps.convolve(f"{name}.local", local, weight)
    steps.calls(name, module, ("proj",))


def _efficientformer_block(steps: Steps, name: str, block: Any) -> None:
    steps.only(name, block, ("token_mixer", "ls1", "mlp", "ls2"))
    for children in (("token_mixer", "ls1"), ("mlp", "ls2")):
        if getattr(block, children[0]) is not None:
            with steps.shortcut(name):
                steps.calls(name, block, children)


def _efficientformer_downsample(steps: Steps, name: str, module: Any) -> None:
    steps.only(name, module, ("conv", "attn"))
    x = steps.value
    out = steps.branch(x, name, module, "conv")
    if module.attn is not None:
        steps.branch(x, name, module, "attn")
        steps.add(name, out)


_EFFICIENTFORMER = "timm.models.efficientformer_v2"
_SEGFORMER = "transformers.models.segformer.modeling_segformer"
_RECIPES: dict[str, Recipe] = {
    **POOLING,
    f"{_EFFICIENTFORMER}.Attention2d": _efficientformer_attention,
    f"{_EFFICIENTFORMER}.Attention2dDownsample": _efficientformer_attention,
    f"{_EFFICIENTFORMER}.Downsample": _efficientformer_downsample,
    f"{_EFFICIENTFORMER}.EfficientFormerV2Block": _efficientformer_block,
    f"{_EFFICIENTFORMER}.LocalGlobalQuery": _efficientformer_query,
    "timm.models.pvt_v2.Attention": _pvt_v2_attention,
    "timm.models.pvt_v2.Block": _pre_norm_block("norm1", "attn", "norm2", "mlp"),
    "timm.models.pvt_v2.OverlapPatchEmbed": _pvt_v2_embedding,
    "timm.models.pvt_v2.PyramidVisionTransformerStage": _pvt_v2_stage,
    "timm.models.tiny_vit.Attention": _inlined,
    "timm.models.tiny_vit.TinyVitBlock": _tiny_vit_block,
    "timm.models.tiny_vit.TinyVitStage": _tiny_vit_stage,
    f"{_SEGFORMER}.SegformerAttention": _segformer_attention,
    f"{_SEGFORMER}.SegformerLayer": _pre_norm_block("layernorm_before", "attention", "layernorm_after", "mlp"),
    f"{_SEGFORMER}.SegformerSequenceReduction": _segformer_reduction,
    f"{_SEGFORMER}.SegformerStage": _segformer_stage,
}


def recipe_of(module: nn.Module) -> Recipe | None:
    """What a module does, by the class that it has or was fused from; None where that is not known."""
    found: type[nn.Module] = type(module).plain_class if isinstance(module, Fusion) else type(module)
    name = qualified_name(found)
    own = qualified_name(found.forward) == f"{name}.forward" and not is_patched(found)
    return _RECIPES.get(name) if own else None


def idle_options(plain_class: type[nn.Module]) -> frozenset[str]:
    """The options of a class's ``forward`` that do nothing."""
    return IDLE_OPTIONS if qualified_name(plain_class) == f"{_SEGFORMER}.SegformerStage" else frozenset()
