"""A whole CeiT as one compiled call, for `ceit_kernels.freeze`."""

from torch import nn

from ceit_kernels.block import ModelParts, prepare_model
from ceit_kernels.common.children import has_own
from ceit_kernels.freeze import Whole

from .blocks import Block, LCABlock, encoder_parts, layers_parts
from .embed import I2TEmbed
from .model import CeiT
from .shortcuts import is_exactly

# What a call of the model calls of it.
_METHODS = "_embed", "_class_feature", "forward_head"


def _has_own_methods() -> bool:
    return all(has_own(CeiT, name) for name in _METHODS)


def prepare_ceit(model: CeiT) -> Whole | None:
    """The model in one call; None if a part has a hook, or the result is not the logits of the class token.

    Args:
        model: fused, in evaluation mode; its tensors must not change any more.
    """
    embed, lca, layer_positions = model.i2t, model.lca, model.pos_layer_embed
    if not (is_exactly(model, CeiT) and is_exactly(embed, I2TEmbed) and is_exactly(lca, LCABlock)):
        return None
    if not _has_own_methods() or any(name in model.__dict__ for name in _METHODS):
        return None
    if model.global_pool != "token" or model.dynamic_img_size or layer_positions is None:
        return None
    if not all(is_exactly(module, nn.Dropout) and not module.training for module in (model.pos_drop, model.head_drop)):
        return None
    blocks = [block for block in model.blocks if is_exactly(block, Block)]
    layers = layers_parts(lca)
    if layers is None or not len(blocks) == len(model.blocks) == layer_positions.shape[1]:
        return None
    parts = ModelParts(
        embed.backbone,
        embed.proj,
        model.cls_token,
        model.pos_embed,
        [encoder_parts(block) for block in blocks],
        layer_positions,
        layers,
        model.norm,
        model.head,
    )
    whole = prepare_model(parts, embed.img_size)
    return None if whole is None else lambda x: whole(x) if _has_own_methods() else None
