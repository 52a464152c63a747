"""Models of timm and transformers, as they come with random weights: the only place that names those that are timed."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


class _Logits(nn.Module):
    """A model of transformers that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> the logits."""
        return self.model(x).logits


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, drop_path_rate=0.0)

    return make


def _segformer(hidden_sizes: Sequence[int], depths: Sequence[int], decoder_hidden_size: int) -> Callable[[], nn.Module]:
    # Without dropout, so that gradients can be compared.
    config: dict[str, Any] = {"num_labels": 150, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
    config |= {"hidden_sizes": hidden_sizes, "depths": depths, "decoder_hidden_size": decoder_hidden_size}

    def make() -> nn.Module:
        import transformers

        return _Logits(transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**config)))

    return make


_SEGFORMER = {
    "segformer_b0": _segformer((32, 64, 160, 256), (2, 2, 2, 2), 256),
    "segformer_b2": _segformer((64, 128, 320, 512), (3, 4, 6, 3), 768),
}
_TIMM = ("pvt_v2_b0", "pvt_v2_b2", "efficientformerv2_s0", "tiny_vit_5m_224", "mobilenetv2_100")
# By name, of libraries that are installed.
MODELS: dict[str, Callable[[], nn.Module]] = {
    **(_SEGFORMER if importlib.util.find_spec("transformers") else {}),
    **({name: _timm(name) for name in _TIMM} if importlib.util.find_spec("timm") else {}),
}


def image_size(name: str) -> int:
    """The side of a model's images at inference."""
    return 512 if name in _SEGFORMER else 224


def randomize(model: nn.Module) -> None:
    """Let every layer matter: fresh scales of layers and of norms may be zero, which would hide a wrong result."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith(("weight", "gamma")):
            nn.init.uniform_(parameter, 0.5, 1.5)
