"""The CeiT model: a vision transformer with convolutions in its stem, its feed-forward layers and on its class tokens.

Source: Yuan et al., Incorporating Convolution Designs into Visual Transformers, ICCV 2021.
"""

from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ceit_kernels.common.arguments import check_at_least, check_probability, names_its_arguments
from ceit_kernels.tokens import embed_tokens

from .blocks import Block, LCABlock, NormLayer, in_a_row
from .embed import I2TEmbed
from .encode import encode
from .shortcuts import is_exactly, is_symbolic

try:
    from timm.models._input import update_model_input_size
except ImportError:

    def update_model_input_size(model: nn.Module, img_size: Sequence[int], **model_args: object) -> None:
        """Do nothing: this version of timm does not follow changes of the input size."""


_layer_norm = partial(nn.LayerNorm, eps=1e-6)


class CeiT(nn.Module):
    """Convolution-enhanced image transformer, with the interface of a timm model.

    Args:
        img_size: (height, width) of the images in pixels, or one number for both.
        patch_size: side of a patch in cells of the stem's map, each 4 pixels wide: 4 means patches of 16x16 pixels.
        in_chans: channels of the images.
        num_classes: number of classes; 0 for no classifier.
        global_pool: what the classifier sees: "token" the class token, "avg" the mean patch token, "" every token.
        embed_dim: embedding dimension C of the tokens.
        depth: number of encoder blocks.
        num_heads: heads of each attention, a divisor of `embed_dim`.
        mlp_ratio: hidden dimension of the feed-forward layers as a multiple of `embed_dim`.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor of the attention scores; None means (embed_dim / num_heads) ** -0.5.
        drop_rate: dropout probability ahead of the classifier.
        pos_drop_rate: dropout probability of the tokens once the positions are added.
        proj_drop_rate: dropout probability behind the attentions' projections and in the LCA's feed-forward layer.
        attn_drop_rate: dropout probability of the attention weights.
        drop_path_rate: probability of skipping half of the last block, per image; rises linearly from 0 with the depth.
        norm_layer: builds a normalisation of the tokens from their dimension.
        leff_local_size: side of LeFF's depthwise kernel in tokens, odd.
        leff_with_bn: whether LeFF has BatchNorm.
        dynamic_img_size: whether each batch may have its own size; the positions are resampled to it on the fly.

    The `drop_rate` of the original code is `pos_drop_rate` and `proj_drop_rate` here; it drops nothing ahead of the
    classifier.

    Raises:
        ValueError, TypeError: for an argument out of its range.
    """

    @names_its_arguments
    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: NormLayer = _layer_norm,
        leff_local_size: int = 3,
        leff_with_bn: bool = True,
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        check_at_least(1, in_chans=in_chans, embed_dim=embed_dim)
        check_at_least(0, num_classes=num_classes)
        check_probability(drop_rate=drop_rate, pos_drop_rate=pos_drop_rate, proj_drop_rate=proj_drop_rate)
        check_probability(attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        if mlp_ratio * embed_dim < 1:
            raise ValueError(f"mlp_ratio: expected at least one channel of {embed_dim}, got {mlp_ratio}")
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads={num_heads}, got {embed_dim}")
        if leff_local_size < 1 or leff_local_size % 2 == 0:
            raise ValueError(f"leff_local_size: expected an odd number, got {leff_local_size}")
        if depth < 1:
            raise ValueError(f"depth: expected at least 1, got {depth}")
        self.global_pool = _checked_pool(global_pool)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False

        # The order of construction is the original's: from the same seed follow the same parameters.
        self.i2t = I2TEmbed(img_size, patch_size, in_chans, embed_dim, strict_img_size=not dynamic_img_size)
        self.grid_size = self.i2t.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.i2t.num_patches, embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        common = {
            "dim": embed_dim,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "qk_scale": qk_scale,
            "proj_drop": proj_drop_rate,
            "attn_drop": attn_drop_rate,
            "norm_layer": norm_layer,
        }
        drop_path_rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(drop_path=rate, kernel_size=leff_local_size, with_bn=leff_with_bn, **common)
            for rate in drop_path_rates
        )
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": self.i2t.feat_ratio(), "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.lca = LCABlock(**common)
        self.pos_layer_embed = nn.Parameter(torch.zeros(1, depth, embed_dim))
        self.norm = norm_layer(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay spares, as in the original training."""
        return {"pos_embed", "cls_token"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations.

        Gradients and BatchNorm's running statistics stay those of ordinary training.
        """
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that sort the parameters into stem, blocks, LCA and head, for layer-wise learning rates."""
        return {"stem": r"^cls_token|pos_embed|i2t", "blocks": r"^blocks\.(\d+)", "lca": r"^pos_layer_embed|lca|norm"}

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, freshly initialised.

        Args:
            num_classes: number of classes; 0 for no classifier.
            global_pool: "token", "avg" or ""; None keeps the present one.

        Raises:
            ValueError: for another `global_pool`.
        """
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        self.num_classes = num_classes
        head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head = head.to(self.pos_embed.device, self.pos_embed.dtype).train(self.training)

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Fit the model to images of another size: positions and patch projection are resampled.

        Args:
            img_size: (height, width) in pixels, or one number for both; None keeps the present one.
            patch_size: side of a patch in cells of the stem's map; None keeps the present one.

        Raises:
            ValueError: if the images are smaller than one patch; the model is unchanged then.
            TypeError: if there is no `I2TEmbed` in `i2t`; the model is unchanged then.
        """
        embed = next((module for module in self.i2t.modules() if isinstance(module, I2TEmbed)), None)
        if embed is None:
            raise TypeError(f"i2t: expected an I2TEmbed or a wrapper of one, got {type(self.i2t).__name__}")
        embed.set_input_size(img_size, patch_size)
        if embed.grid_size != self.grid_size:
            positions = self._positions(embed.grid_size).detach()
            self.pos_embed = nn.Parameter(positions, requires_grad=self.pos_embed.requires_grad)
            self.grid_size = embed.grid_size
        for info in self.feature_info:
            info["reduction"] = embed.feat_ratio()
        update_model_input_size(self, embed.img_size, patch_size=patch_size)

    def forward_features(self, x: Tensor) -> Tensor:
        """Encode images.

        Args:
            x: images (B, in_chans, H, W).

        Returns:
            Normalised tokens (B, 1 + N, embed_dim): the output of LCA, then the last block's N patch tokens.

        Raises:
            ValueError: if the images do not fit the model.
        """
        x, grid_size = self._embed(x)
        tokens, class_tokens, _ = encode(x, self.blocks, grid_size, recomputes=self.grad_checkpointing)
        return self._features(tokens, class_tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify.

        Args:
            x: tokens (B, 1 + N, embed_dim) from `forward_features`.
            pre_logits: whether to stop ahead of the classifier.

        Returns:
            Logits (B, num_classes), or features (B, embed_dim); (B, 1 + N, ...) if `global_pool` is "".
        """
        if self.global_pool == "token":
            x = x[:, :1].squeeze(1)  # whose gradient, if that is all of x, is a view
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images (B, in_chans, H, W): logits (B, num_classes)."""
        only_class_token = self.global_pool == "token"
        x, grid_size = self._embed(x)
        if torch.jit.is_scripting():
            tokens, class_tokens = self._encode_unfused(x, grid_size)
        else:
            # The last block's patch tokens do not reach the logits: nothing normalises them.
            tokens, class_tokens, _ = encode(
                x, self.blocks, grid_size, class_token_only=only_class_token, recomputes=self.grad_checkpointing
            )
        if only_class_token:
            added = None if torch.jit.is_scripting() else tokens
            return self.forward_head(self._class_feature(class_tokens, added))
        return self.forward_head(self._features(tokens, class_tokens))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list | tuple[Tensor, list]:
        """Encode images and return the patch tokens of several blocks as well.

        Args:
            x: images (B, in_chans, H, W).
            indices: blocks to take: the last n for an int, these for a sequence, all for None.
            return_prefix_tokens: whether to pair each of them with its class token (B, 1, embed_dim).
            norm: whether to apply the final normalisation to them.
            stop_early: whether to leave out the blocks behind the last one taken; LCA then ends at that block.
            output_fmt: "NCHW" for maps (B, embed_dim, H, W), "NLC" for tokens (B, N, embed_dim).
            intermediates_only: whether to return only the intermediates.

        Returns:
            The result of `forward_features` and the list of intermediates, or only the list.

        Raises:
            ValueError: for another `output_fmt`, or images that do not fit the model.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        taken, last = _taken(len(self.blocks), indices)
        num_blocks = last + 1 if stop_early else len(self.blocks)
        x, grid_size = self._embed(x)
        blocks = list(self.blocks)[:num_blocks]
        tokens, class_tokens, outputs = encode(x, blocks, grid_size, taken, recomputes=self.grad_checkpointing)
        if norm:
            outputs = [self.norm(y) for y in outputs]
        prefixes = [y[:, : self.num_prefix_tokens] for y in outputs]
        intermediates = [y[:, self.num_prefix_tokens :] for y in outputs]
        if output_fmt == "NCHW":
            intermediates = [y.transpose(1, 2).unflatten(2, grid_size).contiguous() for y in intermediates]
        if return_prefix_tokens:
            intermediates = list(zip(intermediates, prefixes, strict=True))
        return intermediates if intermediates_only else (self._features(tokens, class_tokens), intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates` does not need for the blocks `indices`.

        Args:
            indices: blocks to keep, with all before them: the last n for an int, these for a sequence.
            prune_norm: whether to remove the final normalisation.
            prune_head: whether to remove LCA and the classifier; the features then are the last block's tokens.

        Returns:
            The kept blocks' indices, none negative.
        """
        taken, last = _taken(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.lca = self.pos_layer_embed = None
            self.reset_classifier(0, "")
        return taken

    def _positions(self, grid_size: tuple[int, int]) -> Tensor:
        """Position embeddings (1, 1 + H * W, C) for a grid (H, W)."""
        new_size, old_size = [grid_size[0], grid_size[1]], [self.grid_size[0], self.grid_size[1]]
        return resample_abs_pos_embed(self.pos_embed, new_size, old_size, self.num_prefix_tokens)

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, 1 + H * W, C) of images with their positions added, and their grid (H, W)."""
        if not torch.jit.is_scripting():
            found = self._embed_fused(x)
            if found is not None:
                return self.pos_drop(found[0]), found[1]
        x = self.i2t(x)
        grid_size = (x.shape[2], x.shape[3])
        if not torch.jit.is_scripting():
            grid_size = self._recorded(x, grid_size)
        x = x.flatten(2).transpose(1, 2)
        positions = self._positions(grid_size) if self.dynamic_img_size else self.pos_embed
        if not torch.jit.is_scripting():
            joined = self._joined(x, positions)
            if joined is not None:
                return self.pos_drop(joined), grid_size
        return self.pos_drop(torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + positions), grid_size

    def _joined(self, x: Tensor, positions: Tensor) -> Tensor | None:
        """The tokens with their positions in one pass, where those of the first block's norms are taken so."""
        block = next(iter(self.blocks), None)
        fused = is_exactly(block, Block) and block.is_fused() and not is_symbolic(x)
        return embed_tokens(self.cls_token, x, positions) if fused else None

    def _embed_fused(self, x: Tensor) -> tuple[Tensor, tuple[int, int]] | None:
        """The tokens and their grid in one compiled call; None if the parts have to be called one by one."""
        if self.dynamic_img_size or type(self.i2t) is not I2TEmbed:
            return None
        return self.i2t.tokens_fused(x, self.cls_token, self.pos_embed)

    def _recorded(self, x: Tensor, grid_size: tuple[int, int]) -> tuple[int, int]:
        """The grid, as constants if a graph is recorded and all images have one size."""
        constant = not self.dynamic_img_size and (torch.jit.is_tracing() or is_symbolic(x))
        return self.grid_size if constant else grid_size

    def _encode_unfused(self, x: Tensor, grid_size: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
        """As `encode`, for TorchScript: tokens (B, 1 + N, C) and class tokens (B, 1, C)."""
        class_tokens: list[Tensor] = []
        for block in self.blocks:
            x = block(x, grid_size)
            class_tokens.append(x[:, :1])
        return x, class_tokens

    def _class_feature(self, class_tokens: list[Tensor], added: Tensor | None) -> Tensor:
        """The normalised output of LCA (B, 1, C), or of the last block if LCA was pruned."""
        if self.lca is None or self.pos_layer_embed is None:
            return self.norm(in_a_row(class_tokens[-1:], added)[:, -1:])
        count = class_tokens[0].shape[1] if len(class_tokens) == 1 else len(class_tokens)
        positions = self.pos_layer_embed[:, :count]
        if not torch.jit.is_scripting():
            lca = self.lca
            if is_exactly(lca, LCABlock) and not is_symbolic(class_tokens[0]):
                return lca.normalised(class_tokens, added, positions, self.norm)
        return self.norm(self.lca(in_a_row(class_tokens, added) + positions))

    def _features(self, tokens: Tensor, class_tokens: list[Tensor]) -> Tensor:
        """Normalised tokens (B, 1 + N, C), the output of LCA first."""
        return torch.cat((self._class_feature(class_tokens, None), self.norm(tokens[:, 1:])), dim=1)


def _taken(depth: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """The blocks that `indices` name, as numbers that are not negative, and the last of them."""
    return feature_take_indices(depth, indices if isinstance(indices, int | None) else list(indices))


def _checked_pool(global_pool: str) -> str:
    if global_pool not in ("", "token", "avg"):
        raise ValueError(f"global_pool: expected 'token', 'avg' or '', got {global_pool!r}")
    return global_pool


def _init_weights(module: nn.Module) -> None:
    """Truncated normal weights for linear layers; convolutions keep PyTorch's initialisation."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
