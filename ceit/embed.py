"""The embedding: from images to a grid of patch tokens."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from ceit_kernels.block import embedding_inference
from ceit_kernels.common.arguments import check_at_least

from .layers import Image2Tokens, PatchProjection
from .shortcuts import is_eager, is_exactly, is_left_alone, is_symbolic

Layer = TypeVar("Layer", bound=nn.Module)


class I2TEmbed(nn.Module):
    """Image-to-tokens module (section 3.2): the convolutional stem, then a projection of its patches.

    Stem, projection and their layers may be wrapped: sizes are read from the layers found inside.

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
        self._built_windows = [_window(self.backbone.conv), _window(self.backbone.maxpool)]
        self.img_size, self.patch_size = _size(img_size, "img_size"), _size(patch_size, "patch_size")
        self.set_input_size()
        self.proj = PatchProjection(self.backbone.conv.out_channels, embed_dim, self.patch_size, stride=self.patch_size)

    @property
    def num_patches(self) -> int:
        """Number of patch tokens of an image of the nominal size."""
        return self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self) -> int:
        """Pixels per token along one side."""
        (_, stride, _), (_, pool_stride, _) = self._windows()
        return stride * pool_stride * max(self.patch_size)

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, int]:
        """Grid (H, W) in tokens for images of `img_size` (height, width) pixels."""
        return self._grid_size(img_size, self.patch_size)

    def _grid_size(self, img_size: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int]:
        windows = self._windows()
        height, width = (_map_size(size, windows) // patch for size, patch in zip(img_size, patch_size, strict=True))
        return height, width

    def _windows(self) -> list[tuple[int, int, int]]:
        """Kernel, stride and padding of the stem's convolution and pooling; as built if the layer is not found."""
        layers = _first(self.backbone, nn.Conv2d), _first(self.backbone, nn.MaxPool2d)
        return [
            built if layer is None else _window(layer) for layer, built in zip(layers, self._built_windows, strict=True)
        ]

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Change the nominal size of the images, and resample the projection to another patch size.

        Args:
            img_size: (height, width) in pixels, or one number for both; None keeps the present one.
            patch_size: side of a patch in cells of the stem's map; None keeps the present one.

        Raises:
            ValueError: if the images are smaller than one patch; nothing is changed then.
            TypeError: if the patch size changes and the projection holds no convolution; nothing is changed then.
        """
        image = self.img_size if img_size is None else _size(img_size, "img_size")
        patch = self.patch_size if patch_size is None else _size(patch_size, "patch_size")
        grid_size = self._grid_size(image, patch)
        if min(grid_size) < 1:
            raise ValueError(f"img_size: expected at least one patch, {patch} cells of the stem's map, got {image}")
        if patch != self.patch_size:
            self._resample_projection(patch)
        self.img_size, self.patch_size, self.grid_size = image, patch, grid_size

    def _resample_projection(self, patch_size: tuple[int, int]) -> None:
        projection = _first(self.proj, nn.Conv2d)
        if projection is None:
            raise TypeError(f"patch_size: expected a convolution in proj to resample, got {type(self.proj).__name__}")
        weight = resample_patch_embed(projection.weight.detach(), list(patch_size))
        projection.weight = nn.Parameter(weight, requires_grad=projection.weight.requires_grad)
        projection.kernel_size = projection.stride = patch_size

    def forward(self, x: Tensor) -> Tensor:
        """Embed the patches of images (B, in_chans, H, W) as a map (B, embed_dim, H', W').

        Raises:
            ValueError: for other channels, or another size while `strict_img_size`.
        """
        if not torch.jit.is_scripting():
            self._check_images(x)
        return self.proj(self.backbone(x))

    def tokens_fused(self, x: Tensor, class_token: Tensor, positions: Tensor) -> tuple[Tensor, tuple[int, int]] | None:
        """The class token and the embedded patches (B, 1 + H' * W', embed_dim), their positions added, and (H', W').

        One compiled call; None if the parts have to be called one by one.

        Args:
            x: images, as for `forward`.
            class_token: (1, 1, embed_dim).
            positions: (1, 1 + H' * W', embed_dim).

        Raises:
            ValueError: as `forward`.
        """
        if torch.is_grad_enabled() or not is_eager(x) or not is_exactly(self, I2TEmbed):
            return None
        if not all(is_left_alone(module) for module in self.modules()):
            return None
        self._check_images(x)
        return embedding_inference(x, self.backbone, self.proj, class_token, positions)

    def _check_images(self, x: Tensor) -> None:
        if is_symbolic(x):
            return
        convolution = _first(self.backbone, nn.Conv2d)
        in_chans = "in_chans" if convolution is None else convolution.in_channels
        if x.ndim != 4 or (convolution is not None and x.shape[1] != in_chans):
            raise ValueError(f"x: expected images (B, {in_chans}, H, W), got shape {tuple(x.shape)}")
        if self.strict_img_size and (x.shape[2], x.shape[3]) != self.img_size:
            raise ValueError(
                f"x: expected images of {self.img_size[0]}x{self.img_size[1]} pixels, got {x.shape[2]}x{x.shape[3]}; "
                "call set_input_size, or create the model with dynamic_img_size=True"
            )
        if not self.strict_img_size and min(self.dynamic_feat_size(x.shape[2:])) < 1:
            raise ValueError(f"x: expected images of at least one patch, got {x.shape[2]}x{x.shape[3]} pixels")


def _first(root: nn.Module, kind: type[Layer]) -> Layer | None:
    """The first layer of a class inside a module or its wrappers."""
    return next((module for module in root.modules() if isinstance(module, kind)), None)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, Iterable) else (size, size)
    return height, width


def _size(size: Any, name: str) -> tuple[int, int]:
    """Height and width that a user gave."""
    if isinstance(size, Iterable) and len(size := tuple(size)) != 2:
        raise ValueError(f"{name}: expected height and width, or one number for both, got {size}")
    pair = _pair(size)
    for side in pair:
        check_at_least(1, **{name: side})
    return pair


def _window(layer: nn.Conv2d | nn.MaxPool2d) -> tuple[int, int, int]:
    """Kernel, stride and padding of a layer whose windows are square."""
    return _pair(layer.kernel_size)[0], _pair(layer.stride)[0], _pair(layer.padding)[0]


def _map_size(size: int, windows: Sequence[tuple[int, int, int]]) -> int:
    """Cells of the stem's map along a side of `size` pixels."""
    for kernel, stride, padding in windows:
        size = (size + 2 * padding - kernel) // stride + 1
    return size
