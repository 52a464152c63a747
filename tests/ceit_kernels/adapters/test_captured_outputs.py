"""SegFormer for segmentation, whose calls put hooks on its parts that capture what they return."""

import copy
from unittest import mock

import pytest
import torch
import transformers
from support.adapters import grown
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from ceit_kernels import explain, freeze, fuse
from ceit_kernels.adapters import attention
from ceit_kernels.convnet import module as convnet

pytestmark = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="whose parts are others")
SIZES = {"hidden_sizes": [8, 12], "num_attention_heads": [1, 2], "depths": [1, 2], "num_encoder_blocks": 2}
LISTS = {"patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2], "decoder_hidden_size": 16}


def make(**options):
    model = grown(SegformerForSemanticSegmentation(SegformerConfig(**SIZES, **LISTS, num_labels=3, **options))).eval()
    return model, torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def stages_in_one_call(model, x, **options):
    """The output, and how many stages were one call."""
    with mock.patch.object(
        convnet._Prepacked, "__call__", autospec=True, side_effect=convnet._Prepacked.__call__
    ) as calls:
        return model(x, **options), calls.call_count


def assert_same(found, expected, tolerance=1e-9):
    assert list(found) == list(expected)
    for one, other in zip(found.to_tuple(), expected.to_tuple(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("called_before", [False, True])
def test_stages_stay_one_call(called_before):
    model, x = make()
    expected = model(x) if called_before else copy.deepcopy(model)(x)
    frozen = freeze(model)
    for _ in range(3):
        out, calls = stages_in_one_call(frozen, x)
        assert_same(out, expected)
        assert calls == 2
    assert [row.backend for row in explain(frozen) if row.plain_class == "SegformerStage"] == ["native"] * 2


@torch.no_grad()
@pytest.mark.parametrize("of_config", [False, True])
def test_what_is_asked_for_is_captured(of_config):
    model, x = make(attn_implementation="eager")
    frozen, fused = freeze(model), fuse(copy.deepcopy(model))
    for name, calls in (("output_hidden_states", 2), ("output_attentions", 0)):
        if of_config:
            options = {}
            for each in (model, frozen.model, fused):
                setattr(each.config, name, True)
        else:
            options = {name: True}
        expected = model(x, **options)
        found, count = stages_in_one_call(frozen, x, **options)
        assert_same(found, expected, 1e-6)  # whose softmax is in float32
        assert count == calls
        assert_same(fused(x, **options), expected)
    assert expected.attentions[2].shape == (2, 2, 24, 24)


@torch.no_grad()
def test_attention_is_one_call_of_the_kernel():
    model, x = make()
    fused = fuse(copy.deepcopy(model))
    for _ in range(2):
        with mock.patch.object(attention, "attention_infer_cpu", wraps=attention.attention_infer_cpu) as calls:
            assert_same(fused(x), model(x))
        assert calls.call_count == 3


@torch.no_grad()
@pytest.mark.parametrize("name", ["", ".layernorm_after", ".attention", ".attention.q_proj"])
def test_other_hooks_beside_them_are_honoured(name):
    model, x = make()
    model(x)
    frozen, before = freeze(model), model(x)
    frozen(x)
    for part in (model, frozen.model):
        where = part.segformer.stages[1].get_submodule(f"blocks.0{name}" if name else "")

        def double(module, inputs, out):
            return (2 * out[0], out[1]) if isinstance(out, tuple) else 2 * out

        where.register_forward_hook(double)
    found, calls = stages_in_one_call(frozen, x)
    assert_same(found, model(x))
    assert calls == (1 if name else 2)  # that of a stage itself is called around it
    assert (found.logits - before.logits).abs().max() > 1e-4
    assert_same(freeze(model)(x), model(x))


@torch.no_grad()
def test_a_hook_that_looks_like_them_is_one():
    def install_output_capuring_hook():
        key = "attentions"

        def output_capturing_hook(module, args, output):
            return 2 * output if key else None

        return output_capturing_hook

    model, x = make()
    frozen = freeze(model)
    for each in (model, frozen.model):
        each.segformer.stages[0].blocks[0].layernorm_before.register_forward_hook(install_output_capuring_hook())
    found, calls = stages_in_one_call(frozen, x)
    assert_same(found, model(x))
    assert calls == 1


@torch.no_grad()
def test_a_compiler_sees_the_parts():
    model, x = make()
    model(x)
    frozen = freeze(model)
    compiled = torch.compile(frozen, backend="eager")
    assert_same(compiled(x), model(x))
