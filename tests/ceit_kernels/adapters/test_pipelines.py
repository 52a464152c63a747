"""Snapshots in what asks a model for more than a call: pipelines of transformers."""

import pytest
import torch
import transformers
from PIL import Image
from support.adapters import grown
from torch import nn
from transformers import SegformerConfig, SegformerForImageClassification, SegformerImageProcessor, pipeline

from ceit_kernels import freeze

SIZES = {"hidden_sizes": [8, 12], "num_attention_heads": [1, 2], "depths": [1, 1], "num_encoder_blocks": 2}
LISTS = {"patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}


def make():
    return grown(SegformerForImageClassification(SegformerConfig(**SIZES, **LISTS, num_labels=3))).float().eval()


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="whose pipelines call other methods of a model")
def test_a_pipeline_serves_a_snapshot():
    model = make()
    image = Image.effect_noise((40, 32), 64).convert("RGB")
    options = {"image_processor": SegformerImageProcessor(size={"height": 32, "width": 32}), "device": "cpu"}
    found, expected = (pipeline("image-classification", each, **options)(image) for each in (freeze(model), model))
    for one, other in zip(found, expected, strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_snapshot_says_what_it_is_and_cannot_be_given_another(dtype):
    model = make().to(dtype)
    frozen = freeze(model)
    assert (frozen.dtype, frozen.device) == (dtype, torch.device("cpu")) == (model.dtype, model.device)
    assert frozen.config is frozen.model.config
    for name in ("config", "dtype", "device"):
        with pytest.raises(AttributeError):
            setattr(frozen, name, getattr(model, name))


def test_what_a_snapshot_has_not_is_no_attribute():
    for name in ("config", "dtype", "device"):
        assert not hasattr(freeze(nn.ReLU()), name)
