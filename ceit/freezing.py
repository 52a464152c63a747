"""A whole CeiT as one compiled call, for `ceit_kernels.freeze`."""

from torch import nn

from ceit_kernels.block import ModelParts, WholeModel, prepare_model

from .blocks import Block, LCABlock, encoder_parts, layers_parts
from .embed import I2TEmbed
from .model import CeiT
from .shortcuts import is_exactly


def prepare_ceit(model: CeiT) -> WholeModel | None:
    """The model in one call; None if a part has a hook, or the result is not the logits of the class token.

    Args:
        model: fused, in evaluation mode; its tensors must not change any more.
    """
    ours = is_exactly(model, CeiT) and is_exactly(model.i2t, I2TEmbed) and is_exactly(model.lca, LCABlock)
    if not ours or model.global_pool != "token" or model.dynamic_img_size:
        return None
    if not all(is_exactly(block, Block) for block in model.blocks):
        return None
    if not all(is_exactly(module, nn.Dropout) and not module.training for module in (model.pos_drop, model.head_drop)):
        return None
    layers = layers_parts(model.lca)
    if layers is None:
        return None
    embed = model.i2t
    parts = ModelParts(
        embed.backbone,
        embed.proj,
        model.cls_token,
        model.pos_embed,
        [encoder_parts(block) for block in model.blocks],
        model.pos_layer_embed,
        layers,
        model.norm,
        model.head,
    )
    return prepare_model(parts, embed.img_size)
