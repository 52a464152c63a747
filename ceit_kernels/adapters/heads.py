"""What models of timm and torchvision do with their features, pooling and classifiers, where ``freeze`` goes on.

A head tells ``convnet.layers.Steps`` what the ``forward`` of a model does behind its features; heads of other classes
are modules themselves, which recipes follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from ..common.children import qualified_name
from ..common.module import Fusion

if TYPE_CHECKING:
    from ..convnet.layers import Steps

__all__ = ["POOLING", "Head", "head_of"]


class Head(NamedTuple):
    """What follows the features.

    Attributes:
        follow: tells steps what it does.
        children: of the model, that it calls.
        methods: of the model, that call it.
    """

    follow: Callable[[Steps, str, Any], None]
    children: tuple[str, ...]
    methods: tuple[str, ...] = ("forward", "forward_features", "forward_head")


def _in_order(*children: str) -> Head:
    """Children that are called one after another."""
    return Head(lambda steps, name, model: steps.calls(name, model, children), children)


def _pvt_v2(steps: Steps, name: str, model: Any) -> None:
    if not model.global_pool:
        steps.refuse(f"{name} does not pool")
    steps.pool(name)
    steps.flatten(name)
    steps.calls(name, model, ("head_drop", "head"))


def _efficientformer(steps: Steps, name: str, model: Any) -> None:
    """Whose norm is one of means as well as of pixels, and whose classifiers give their mean."""
    if model.global_pool != "avg":
        steps.refuse(f"{name} does not pool")
    steps.pool(name)
    steps.call(f"{name}.norm", model.norm)
    steps.flatten(name)
    steps.call(f"{name}.head_drop", model.head_drop)
    means = steps.value
    logits = steps.branch(means, name, model, "head")
    if model.head_dist is not None:
        steps.scale(name, 0.5)
        steps.branch(means, name, model, "head_dist")
        steps.scale(name, 0.5)
        steps.add(name, logits)


_HEADS = {
    "timm.models.efficientformer_v2.EfficientFormerV2": Head(
        _efficientformer, ("norm", "head_drop", "head", "head_dist")
    ),
    "timm.models.efficientnet.EfficientNet": _in_order("global_pool", "classifier"),
    "timm.models.mobilenetv3.MobileNetV3": _in_order(
        "global_pool", "conv_head", "norm_head", "act2", "flatten", "classifier"
    ),
    "timm.models.pvt_v2.PyramidVisionTransformerV2": Head(_pvt_v2, ("head_drop", "head")),
    "timm.models.tiny_vit.TinyVit": _in_order("head"),
}


def head_of(module: nn.Module) -> Head | None:
    """What follows a model's features, by the class that it has or was fused from; None where that is not known."""
    found: type[nn.Module] = type(module).plain_class if isinstance(module, Fusion) else type(module)
    return _HEADS.get(qualified_name(found))


def _pooling(steps: Steps, name: str, module: Any) -> None:
    if module.output_size not in (1, (1, 1)):
        steps.refuse(f"{name} gives more than one pixel")
    steps.pool(name)


def _fast_pooling(steps: Steps, name: str, module: Any) -> None:
    if tuple(module.dim) != (2, 3):
        steps.refuse(f"{name} takes the mean of other dimensions")
    steps.pool(name)
    if module.flatten:
        steps.flatten(name)


def _selected_pooling(steps: Steps, name: str, module: Any) -> None:
    steps.only(name, module, ("pool", "flatten"))
    steps.calls(name, module, ("pool", "flatten"))


def _flatten(steps: Steps, name: str, module: Any) -> None:
    if (module.start_dim, module.end_dim) != (1, -1):
        steps.refuse(f"{name} keeps dimensions")
    steps.flatten(name)


def _torchvision(method: str, features: str) -> Callable[[Steps, str, Any], None]:
    """A whole model that pools what one child makes and classifies it."""

    def recipe(steps: Steps, name: str, model: Any) -> None:
        steps.own(name, model, (method,))
        steps.only(name, model, (features, "avgpool", "classifier"))
        steps.calls(name, model, (features,))
        if "avgpool" in model._modules:
            steps.calls(name, model, ("avgpool",))
        else:
            steps.pool(name)
        steps.flatten(name)
        steps.calls(name, model, ("classifier",))

    return recipe


_POOL = "timm.layers.adaptive_avgmax_pool"
# Recipes, as those of ``recipes``.
POOLING = {
    "torch.nn.modules.flatten.Flatten": _flatten,
    "torch.nn.modules.pooling.AdaptiveAvgPool2d": _pooling,
    f"{_POOL}.FastAdaptiveAvgPool": _fast_pooling,
    f"{_POOL}.SelectAdaptivePool2d": _selected_pooling,
    "torchvision.models.efficientnet.EfficientNet": _torchvision("_forward_impl", "features"),
    "torchvision.models.mnasnet.MNASNet": _torchvision("forward", "layers"),
    "torchvision.models.mobilenetv2.MobileNetV2": _torchvision("_forward_impl", "features"),
    "torchvision.models.mobilenetv3.MobileNetV3": _torchvision("_forward_impl", "features"),
}
