"""Models of timm with attention, of few channels and classes."""

from timm.models.efficientformer_v2 import EfficientFormerV2
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.tiny_vit import TinyVit


def efficientformer(*size):
    """EfficientFormerV2 for images of a size."""
    widths = {"embed_dims": (6, 8, 12, 20), "depths": (1, 1, 2, 2), "mlp_ratios": 2}
    return EfficientFormerV2(**widths, img_size=size, num_vit=1, num_classes=5)


def tiny_vit():
    """TinyViT."""
    sizes = {"embed_dims": (8, 12, 16), "depths": (1, 2, 1), "num_heads": (1, 3, 2), "window_sizes": (7, 3, 3)}
    return TinyVit(**sizes, num_classes=5)


def pvt_v2():
    """PVTv2."""
    sizes = {"embed_dims": (8, 12), "depths": (1, 2), "num_heads": (1, 3), "sr_ratios": (4, 1), "mlp_ratios": (4, 2)}
    return PyramidVisionTransformerV2(**sizes, num_classes=5)
