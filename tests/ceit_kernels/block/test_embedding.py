"""From images to tokens in one call on the CPU: the same as its layers, and only where nobody would notice."""

import copy

import pytest
import torch
from support.accuracy import assert_as_accurate
from torch import nn

from ceit.embed import I2TEmbed
from ceit_kernels import fuse, use_backend
from ceit_kernels.block import embedding_inference


def make_embed(img_size=(64, 48), embed_dim=24, patch_size=4) -> I2TEmbed:
    torch.manual_seed(0)
    embed = I2TEmbed(img_size, patch_size, 3, embed_dim).eval()
    bn = embed.backbone.bn
    nn.init.uniform_(bn.running_mean, -0.2, 0.2)
    nn.init.uniform_(bn.running_var, 0.5, 2.0)
    nn.init.uniform_(bn.weight, -1.0, 1.0)
    return embed


def make_inputs(embed: I2TEmbed, batch=2):
    channels = embed.proj.out_channels
    images = torch.randn(batch, 3, *embed.img_size)
    return images, torch.randn(1, 1, channels), torch.randn(1, 1 + embed.num_patches, channels)


def one_by_one(embed: I2TEmbed, images, class_token, positions):
    patches = embed(images).flatten(2).transpose(1, 2)
    return torch.cat((class_token.expand(images.shape[0], -1, -1), patches), dim=1) + positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("img_size", "embed_dim", "patch_size"), [((64, 48), 24, 4), ((70, 37), 100, (2, 3)), (224, 192, 4)]
)
@torch.no_grad()
def test_is_as_accurate_as_plain_pytorch(dtype, threads, batch, img_size, embed_dim, patch_size):
    plain = make_embed(img_size, embed_dim, patch_size).to(dtype)
    inputs = [tensor.to(dtype) for tensor in make_inputs(plain, batch)]
    expected = one_by_one(plain, *inputs)
    exact = one_by_one(copy.deepcopy(plain).double(), *(tensor.double() for tensor in inputs))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = fuse(plain).tokens_fused(*inputs)[0]
    finally:
        torch.set_num_threads(before)
    assert_as_accurate(["tokens"], [found], [expected], [exact])


@torch.no_grad()
def test_takes_images_of_any_strides_and_follows_what_changes():
    embed = fuse(make_embed())
    images, class_token, positions = make_inputs(embed)
    found = embed.tokens_fused(images, class_token, positions)[0]
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(embed.tokens_fused(last, class_token, positions)[0], found)
    moved = embed.tokens_fused(images, class_token, positions + 1)[0]
    torch.testing.assert_close(moved, found + 1)
    for tensor in (embed.proj.weight, embed.backbone.bn.running_var, embed.backbone.conv.weight):
        before = embed.tokens_fused(images, class_token, positions)[0]
        tensor.mul_(1.5)
        after = embed.tokens_fused(images, class_token, positions)[0]
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, one_by_one(embed, images, class_token, positions), rtol=1e-4, atol=1e-4)


def test_declines_where_someone_would_notice():
    embed = fuse(make_embed())
    images, *others = make_inputs(embed)
    assert embed.tokens_fused(images, *others) is None  # gradients
    with torch.no_grad():
        assert embed.tokens_fused(images, *others) is not None
        for operator in ("i2t", "linear"):
            with use_backend(f"{operator}=reference"):
                assert embed.tokens_fused(images, *others) is None
        for module in (embed, embed.backbone, embed.backbone.bn, embed.proj):
            handle = module.register_forward_hook(lambda *_: None)
            assert embed.tokens_fused(images, *others) is None
            handle.remove()
        embed.backbone.bn.train()
        assert embed.tokens_fused(images, *others) is None
        plain = make_embed()
        assert embedding_inference(images, plain.backbone, plain.proj, *others) is None


@torch.no_grad()
def test_images_of_another_size_are_an_error():
    embed = fuse(make_embed())
    _, *others = make_inputs(embed)
    with pytest.raises(ValueError, match="x: expected images of 64x48 pixels, got 32x32"):
        embed.tokens_fused(torch.zeros(1, 3, 32, 32), *others)
