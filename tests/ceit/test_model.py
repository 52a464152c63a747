"""What the model can do beyond the original: sizes, channels, options, checkpointing, compilation."""

import copy

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch._subclasses import FakeTensorMode

from ceit import CeiT
from ceit_kernels import freeze, fuse

SMALL = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"img_size": (48, 80)}, (3, 48, 80)),
        ({"img_size": (75, 50)}, (3, 75, 50)),
        ({"patch_size": 2}, (3, 64, 64)),
        ({"in_chans": 1}, (1, 64, 64)),
        ({"in_chans": 5}, (5, 64, 64)),
        ({"leff_local_size": 5}, (3, 64, 64)),
        ({"leff_local_size": 7}, (3, 64, 64)),
        ({"leff_with_bn": False}, (3, 64, 64)),
        ({"qkv_bias": False}, (3, 64, 64)),
        ({"global_pool": "avg"}, (3, 64, 64)),
    ],
    ids=str,
)
def test_options_train_and_every_parameter_gets_a_gradient(options, shape):
    model = CeiT(**{**SMALL, **options})
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 7)
    logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("global_pool", ["token", "avg", ""])
@pytest.mark.parametrize("training", [True, False])
def test_forward_is_forward_head_of_forward_features_to_the_bit(global_pool, training, images):
    model = CeiT(**SMALL, global_pool=global_pool).train(training)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images)))


def test_token_pooling_does_not_normalise_the_patch_tokens(images):
    model = CeiT(**SMALL)
    normalised = []
    model.norm.register_forward_hook(lambda module, args, output: normalised.append(output.shape))
    model(images)
    assert normalised == [(2, 1, 32)]


def test_the_last_blocks_leff_gets_gradients_of_zero(images):
    model = CeiT(**SMALL)
    model(images).sum().backward()
    assert all((p.grad == 0).all() for p in model.blocks[-1].leff.parameters())
    assert all((p.grad != 0).any() for p in model.blocks[-2].leff.conv1.parameters() if p.dim() > 1)
    # They lie in one piece of memory, little larger than they are, and are the user's like any others.
    places = {p.grad.data_ptr(): p.grad.nbytes for p in model.blocks[-1].leff.parameters()}
    assert not any(place % 64 for place in places)
    (memory,) = {p.grad.untyped_storage().nbytes() for p in model.blocks[-1].leff.parameters()}
    assert memory <= sum(places.values()) + 128 * len(places)
    for number, p in enumerate(model.blocks[-1].leff.parameters()):
        assert (p.grad.shape, p.grad.stride()) == (p.shape, p.contiguous().stride())
        p.grad.detach_().fill_(number)
    assert all((p.grad == number).all() for number, p in enumerate(model.blocks[-1].leff.parameters()))


def test_without_classes_the_model_returns_features(images):
    assert CeiT(**{**SMALL, "num_classes": 0})(images).shape == (2, 32)


def test_one_input_size_after_another_with_dynamic_img_size(images):
    fixed, dynamic = CeiT(**SMALL), CeiT(**SMALL, dynamic_img_size=True)
    dynamic.load_state_dict(fixed.state_dict())
    fixed.eval(), dynamic.eval()
    assert torch.equal(dynamic(images), fixed(images))
    for size in [(96, 48), (70, 131), (16, 16)]:
        resized = copy.deepcopy(fixed)
        resized.set_input_size(size)
        batch = torch.randn(2, 3, *size)
        assert torch.equal(dynamic(batch), resized(batch))


@torch.no_grad()
def test_the_grid_is_that_of_the_image_whatever_the_attribute_says(images):
    model = CeiT(**SMALL).eval()
    expected = model(images)
    model.grid_size = (7, 1)
    for called in (model, freeze(model), fuse(model)):
        torch.testing.assert_close(called(images), expected)


def test_set_input_size_resamples_the_positions_of_the_grid_and_keeps_the_class_tokens():
    model = CeiT(**SMALL).requires_grad_(False)
    before = model.pos_embed
    model.set_input_size((96, 80))
    assert model.i2t.grid_size == (6, 5)
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(before, [6, 5], [4, 4]))
    assert torch.equal(model.pos_embed[:, 0], before[:, 0])
    assert not model.pos_embed.requires_grad
    assert model.pos_layer_embed.shape == (1, 3, 32)
    assert model(torch.randn(1, 3, 96, 80)).shape == (1, 7)


def test_set_input_size_resamples_the_projection_to_another_patch_size():
    model = CeiT(**SMALL)
    model.set_input_size(patch_size=2)
    assert model.i2t.proj.weight.shape == (32, 64, 2, 2)
    assert model.i2t.grid_size == (8, 8)
    assert {info["reduction"] for info in model.feature_info} == {8}
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)


def test_set_input_size_to_an_image_without_a_patch_changes_nothing():
    model = CeiT(**SMALL)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"img_size: expected at least one patch.*got \(12, 64\)"):
        model.set_input_size((12, 64), patch_size=8)
    assert model.i2t.img_size == (64, 64)
    assert model.i2t.patch_size == (4, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_drop_path_grows_with_the_depth_and_spares_lca():
    model = CeiT(**SMALL, drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_gradient_checkpointing_changes_neither_gradients_nor_buffers(images):
    dropping = {"drop_path_rate": 0.3, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "pos_drop_rate": 0.1}
    plain = CeiT(**SMALL, **dropping)
    recomputing = copy.deepcopy(plain)
    recomputing.set_grad_checkpointing()
    for model in (plain, recomputing):
        torch.manual_seed(1)
        model(images).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), recomputing.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), recomputing.buffers(), strict=True))
    assert plain.blocks[0].leff.bn1.num_batches_tracked == 1


def test_gradient_checkpointing_keeps_fewer_tensors(images):
    def saved(checkpointing):
        model = CeiT(**SMALL)
        model.set_grad_checkpointing(checkpointing)
        count = 0

        def pack(tensor):
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images)
        return count

    assert saved(True) < saved(False) / 2


def test_compiles_without_graph_breaks_with_checkpointing(images):
    eager = CeiT(**{**SMALL, "depth": 2})
    model = copy.deepcopy(eager)
    model.set_grad_checkpointing(True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for function in (eager, compiled):
        function(images).square().mean().backward()
    for a, b in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)
    for a, b in zip(eager.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leff_local_size": 4}, "leff_local_size: expected an odd number, got 4"),
        ({"leff_local_size": -1}, "leff_local_size: expected an odd number, got -1"),
        ({"embed_dim": 33}, "embed_dim: expected a multiple of num_heads=2, got 33"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"global_pool": "max"}, "global_pool: expected 'token', 'avg' or '', got 'max'"),
        ({"img_size": (8, 8, 8)}, r"img_size: expected height and width, or one number for both, got \(8, 8, 8\)"),
        ({"img_size": 12}, r"img_size: expected at least one patch, \(4, 4\) cells.*got \(12, 12\)"),
    ],
    ids=str,
)
def test_bad_options_are_named_with_what_is_expected(options, message):
    with pytest.raises(ValueError, match=message):
        CeiT(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 3, 65, 64), {}, "x: expected images of 64x64 pixels, got 65x64; call set_input_size"),
        ((2, 1, 64, 64), {}, r"x: expected images \(B, 3, H, W\), got shape \(2, 1, 64, 64\)"),
        ((3, 64, 64), {}, r"x: expected images \(B, 3, H, W\), got shape \(3, 64, 64\)"),
        ((2, 3, 64, 12), {"dynamic_img_size": True}, "x: expected images of at least one patch, got 64x12 pixels"),
    ],
    ids=str,
)
def test_images_that_do_not_fit_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        CeiT(**SMALL, **options)(torch.randn(shape))


@pytest.mark.parametrize("training", [False, True])
def test_a_fused_model_takes_fake_tensors_as_the_plain_one_does(training):
    model = fuse(CeiT(**SMALL)).train(training)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(training):
        out = model(torch.empty(2, 3, 64, 64))
        if training:
            out.sum().backward()
    assert out.shape == (2, 7)
