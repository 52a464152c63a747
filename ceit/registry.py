"""The named models: registered with timm; `create_model` also loads checkpoints and fuses."""

import difflib
import json
from collections.abc import Collection
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import register_notrace_module
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from ceit_kernels import FusedLinear, fast_operators, fuse
from ceit_kernels.common.arguments import names_its_arguments
from ceit_kernels.operators import OPERATORS

from .blocks import Block, LCABlock
from .checkpoint import checkpoint_filter_fn, load_checkpoint
from .embed import I2TEmbed
from .model import CeiT


def _cfg(img_size: int = 224) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, img_size, img_size),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "i2t.backbone.conv",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_name": "Incorporating Convolution Designs into Visual Transformers",
        "paper_ids": "arXiv:2103.11816",
    }


default_cfgs = generate_default_cfgs(
    {
        "ceit_tiny_patch16_224": _cfg(),
        "ceit_small_patch16_224": _cfg(),
        "ceit_base_patch16_224": _cfg(),
        "ceit_tiny_patch16_384": _cfg(384),
        "ceit_small_patch16_384": _cfg(384),
    }
)


# Each of these is one node in timm's graphs.
for _layer in (I2TEmbed, Block, LCABlock, FusedLinear):
    register_notrace_module(_layer)


def list_models() -> list[str]:
    """Names of the models, for `create_model` and `timm.create_model`."""
    return list(default_cfgs)


@names_its_arguments
def create_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | PathLike | None = None,
    fused: bool | str | Collection[str] = "auto",
    **kwargs: Any,
) -> nn.Module:
    """Create a model of the CeiT family.

    Args:
        name: one of `list_models()`, or a folder in the layout of timm's hub checkpoints (`config.json` and
            `model.safetensors`), with its weights.
        pretrained: only with a `pretrained_cfg_overlay` that says where weights are; none are published with the names.
        checkpoint: file of weights for `load_checkpoint`, loaded into the model before anything is fused.
        fused: which operators are fused: True for all, False for none, a collection of "leff", "lca", "i2t",
            "add_norm", "linear" and "attention", or "auto" for those that are faster than plain PyTorch here.
        **kwargs: arguments of `CeiT`, and timm's `features_only` and `out_indices`.

    Returns:
        A `CeiT`, or timm's feature extractor around one with `features_only=True`.

    Raises:
        ValueError: for an unknown name, a bad `fused`, weights that are asked for but do not exist, arguments out of
            range, or a checkpoint that is unreadable or does not match.
        OSError: if the file `checkpoint` cannot be opened.
        RuntimeError: if the weights in a folder do not match its configuration.
    """
    if is_model_folder(name):
        name, pretrained = _source_of(Path(name)), True
    elif name not in default_cfgs:
        close = difflib.get_close_matches(str(name), list_models())
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"name: unknown model {name!r}; {hint}available: {', '.join(list_models())}")
    return timm.create_model(name, pretrained=pretrained, checkpoint=checkpoint, fused=fused, **kwargs)


def is_model_folder(name: str | PathLike) -> bool:
    """Whether this is a folder in the layout of timm's hub checkpoints, by its `config.json`."""
    return name not in default_cfgs and (Path(name) / "config.json").is_file()


def _source_of(folder: Path) -> str:
    """timm's name for the model in a folder, which is one of ours."""
    try:
        architecture = json.loads((folder / "config.json").read_text())["architecture"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"name: {folder / 'config.json'} does not say which model it is of") from error
    if architecture not in default_cfgs:
        raise ValueError(f"name: {folder} holds a {architecture}, expected one of {', '.join(list_models())}")
    return f"local-dir:{folder}"


def _operators(fused: bool | str | Collection[str]) -> set[str]:
    """The operators that the argument `fused` names."""
    if isinstance(fused, bool):
        return set(OPERATORS) if fused else set()
    if fused == "auto":
        return set(fast_operators())
    if isinstance(fused, str) or not isinstance(fused, Collection) or not set(fused) <= set(OPERATORS):
        raise ValueError(
            f"fused: expected True, False, 'auto' or a collection of {', '.join(OPERATORS)}, got {fused!r}"
        )
    return set(fused)


def _build(checkpoint: str | PathLike | None, operators: set[str], **kwargs: Any) -> CeiT:
    model = CeiT(**kwargs)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return fuse(model, **{name: name in operators for name in OPERATORS}) if operators else model


def _create_ceit(
    variant: str,
    pretrained: bool = False,
    *,
    checkpoint: str | PathLike | None = None,
    fused: bool | str | Collection[str] = False,
    out_indices: int | Collection[int] = 3,
    **kwargs: Any,
) -> nn.Module:
    operators = _operators(fused)
    source = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if pretrained and not (source.has_weights or source.state_dict):
        raise ValueError(f"pretrained: no weights are published for {variant}; give a file of weights as checkpoint=")
    return build_model_with_cfg(
        partial(_build, checkpoint, operators),
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def ceit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CeiT-T at 224x224 pixels: 6.4 million parameters."""
    args = {"embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create_ceit("ceit_tiny_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def ceit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CeiT-S at 224x224 pixels: 24.2 million parameters."""
    args = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create_ceit("ceit_small_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def ceit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CeiT-B at 224x224 pixels: 94.4 million parameters."""
    args = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create_ceit("ceit_base_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def ceit_tiny_patch16_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CeiT-T at 384x384 pixels: 6.4 million parameters."""
    args = {"embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create_ceit("ceit_tiny_patch16_384", pretrained, **{**args, **kwargs})


@register_model
def ceit_small_patch16_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CeiT-S at 384x384 pixels: 24.4 million parameters."""
    args = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create_ceit("ceit_small_patch16_384", pretrained, **{**args, **kwargs})
