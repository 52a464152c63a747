"""From images to a grid of patch embeddings."""

from collections.abc import Sequence

import torch
from timm.layers import resample_patch_embed, to_2tuple
from torch import Tensor, nn

from ceit_kernels.block import embedding_inference

from .layers import Image2Tokens, PatchProjection, is_watched


class I2TEmbed(nn.Module):
    """Image-to-tokens module (section 3.2): the convolutional stem, then a projection of its patches.

    Args:
        img_size: (height, width) of the images in pixels, or one number for both.
        patch_size: side of a patch in cells of the stem's map, each about 4 pixels wide.
        in_chans: channels of the images.
        embed_dim: embedding dimension of the tokens.
        strict_img_size: whether images of another size are refused.

    Shapes:
        (B, in_chans, H, W) -> (B, embed_dim, H', W') with (H', W') = dynamic_feat_size((H, W)).
        Cells beyond the last whole patch are dropped.

    Raises:
        ValueError: if the images are smaller than one patch.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        in_chans: int = 3,
        embed_dim: int = 768,
        strict_img_size: bool = True,
    ) -> None:
        super().__init__()
        self.strict_img_size = strict_img_size
        self.backbone = Image2Tokens(in_chans)
        self.img_size = tuple(to_2tuple(img_size))
        self.patch_size = tuple(to_2tuple(patch_size))
        self.set_input_size()
        self.proj = PatchProjection(self.backbone.conv.out_channels, embed_dim, self.patch_size, stride=self.patch_size)

    @property
    def num_patches(self) -> int:
        """Number of patch tokens of an image of the nominal size."""
        return self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self) -> int:
        """Pixels per token along one side."""
        stem = self.backbone
        return stem.conv.stride[0] * stem.maxpool.stride * max(self.patch_size)

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, int]:
        """Grid (H, W) in tokens for images of `img_size` (height, width) pixels."""
        return self._grid_size(img_size, self.patch_size)

    def _grid_size(self, img_size: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int]:
        height, width = (self._map_size(size) // patch for size, patch in zip(img_size, patch_size, strict=True))
        return height, width

    def _map_size(self, size: int) -> int:
        """Cells of the stem's map along a side of `size` pixels."""
        conv, pool = self.backbone.conv, self.backbone.maxpool
        size = (size + 2 * conv.padding[0] - conv.kernel_size[0]) // conv.stride[0] + 1
        return (size + 2 * pool.padding - pool.kernel_size) // pool.stride + 1

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Change the nominal size of the images, and resample the projection to another patch size.

        Args:
            img_size: (height, width) in pixels, or one number for both; None keeps the present one.
            patch_size: side of a patch in cells of the stem's map; None keeps the present one.

        Raises:
            ValueError: if the images are smaller than one patch; nothing is changed then.
        """
        img_size = self.img_size if img_size is None else tuple(to_2tuple(img_size))
        patch_size = self.patch_size if patch_size is None else tuple(to_2tuple(patch_size))
        grid_size = self._grid_size(img_size, patch_size)
        if min(grid_size) < 1:
            raise ValueError(
                f"img_size: expected at least one patch, {patch_size} cells of the stem's map, got {img_size}"
            )
        if patch_size != self.patch_size:
            self._resample_projection(patch_size)
        self.img_size, self.patch_size, self.grid_size = img_size, patch_size, grid_size

    def _resample_projection(self, patch_size: tuple[int, int]) -> None:
        weight = resample_patch_embed(self.proj.weight.detach(), list(patch_size))
        self.proj.weight = nn.Parameter(weight, requires_grad=self.proj.weight.requires_grad)
        self.proj.kernel_size = self.proj.stride = patch_size

    def forward(self, x: Tensor) -> Tensor:
        """Embed the patches of images (B, in_chans, H, W) as a map (B, embed_dim, H', W').

        Raises:
            ValueError: for other channels, or another size while `strict_img_size`.
        """
        self._check_images(x)
        return self.proj(self.backbone(x))

    def tokens_at_once(self, x: Tensor, class_token: Tensor, positions: Tensor) -> Tensor | None:
        """The class token and the embedded patches with their positions added (B, 1 + H' * W', embed_dim).

        In one compiled call; None where it takes a call for every part.

        Args:
            x: images, as for `forward`.
            class_token: (1, 1, embed_dim).
            positions: (1, 1 + H' * W', embed_dim).

        Raises:
            ValueError: as `forward`.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if type(self) is not I2TEmbed or "forward" in self.__dict__ or is_watched(self):
            return None
        self._check_images(x)
        return embedding_inference(x, self.backbone, self.proj, class_token, positions)

    def _check_images(self, x: Tensor) -> None:
        in_chans = self.backbone.conv.in_channels
        if x.ndim != 4 or x.shape[1] != in_chans:
            raise ValueError(f"x: expected images (B, {in_chans}, H, W), got shape {tuple(x.shape)}")
        if self.strict_img_size and (x.shape[2], x.shape[3]) != self.img_size:
            raise ValueError(
                f"x: expected images of {self.img_size[0]}x{self.img_size[1]} pixels, got {x.shape[2]}x{x.shape[3]}; "
                "call set_input_size, or create the model with dynamic_img_size=True"
            )
        if min(self.dynamic_feat_size(x.shape[2:])) < 1:
            raise ValueError(f"x: expected images of at least one patch, got {x.shape[2]}x{x.shape[3]} pixels")
