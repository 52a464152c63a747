"""Training a CeiT with the fused operators and without, from one seed."""

import copy

import pytest
import torch
from support.where import DEVICE
from torch import nn

import ceit
from ceit_kernels import fuse, use_backend


def train(size, batch, fused, steps, **options):
    """The losses of some steps in float32, over a few batches again and again."""
    torch.manual_seed(0)
    model = ceit.create_model("ceit_tiny_patch16_224", img_size=size, num_classes=10, fused=fused, **options).to(DEVICE)
    images = [torch.randn(batch, 3, size, size, device=DEVICE) for _ in range(5)]
    labels = torch.arange(batch, device=DEVICE) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[step % len(images)]), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def compare(backend, size, batch, fused=True, steps=50, **options):
    plain = train(size, batch, False, steps, **options)
    with use_backend(backend):
        torch.testing.assert_close(train(size, batch, fused, steps, **options), plain, rtol=1e-4, atol=0)
    assert plain[-steps // 3 :].mean() < plain[: steps // 3].mean()


def test_fifty_steps_have_the_losses_of_plain_pytorch():
    compare("auto", 64, 8, embed_dim=32, depth=2, num_heads=2)


@pytest.mark.kernels(ttsem=False)
def test_ten_steps_with_the_triton_kernels_have_the_losses_of_plain_pytorch():
    compare("leff=triton,lca=triton,add_norm=triton", 32, 2, steps=10, embed_dim=8, depth=2, num_heads=1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pixel", [float("nan"), float("inf")], ids=str)
def test_a_pixel_that_is_no_number_reaches_the_gradients_that_it_does_in_plain_pytorch(pixel, training):
    """Of biases ahead of batch statistics too, which are 0 otherwise: a loss scaler is to see it."""
    torch.manual_seed(0)
    plain = ceit.CeiT(img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=5).train(training)
    fused, images = fuse(copy.deepcopy(plain)), torch.randn(2, 3, 32, 32)
    images[0, 0, 5, 5] = pixel
    for model in (plain, fused):
        model(images).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert torch.equal(one.grad.isfinite(), other.grad.isfinite()), name


@pytest.mark.gpu
def test_fifty_steps_of_ceit_tiny_have_the_losses_of_plain_pytorch():
    compare("leff=triton", 224, 16, fused=["leff"])
