"""The block over class tokens in one call on the CPU: the same as its layers, and only where nobody would notice."""

import copy

import pytest
import torch
from support.accuracy import assert_as_accurate

from ceit.blocks import LCABlock
from ceit_kernels import fuse


def make_block(dim=24, heads=3, **options) -> LCABlock:
    torch.manual_seed(0)
    return LCABlock(dim, heads, **options).eval()


def spied(monkeypatch):
    from ceit_kernels.block import layers_inference

    results = []

    def spy(*arguments):
        results.append(layers_inference(*arguments))
        return results[-1]

    monkeypatch.setattr("ceit.blocks.layers_inference", spy)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("batch", "layers", "dim", "heads"), [(1, 12, 192, 3), (5, 3, 24, 3), (2, 1, 100, 2)])
def test_is_as_accurate_as_plain_pytorch(monkeypatch, dtype, threads, batch, layers, dim, heads):
    plain, x = make_block(dim, heads, qkv_bias=True).to(dtype), torch.randn(batch, layers, dim).to(dtype)
    results = spied(monkeypatch)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            expected, exact = plain(x), copy.deepcopy(plain).double()(x.double())
            out = fuse(plain)(x)
        assert out is results[-1]
        assert_as_accurate(["class token"], [out], [expected], [exact])
    finally:
        torch.set_num_threads(before)


def test_follows_weights_that_change_and_takes_tokens_of_any_strides(monkeypatch):
    block, x = fuse(make_block()), torch.randn(2, 5, 24)
    with torch.no_grad():
        before = block(x)
        torch.testing.assert_close(block(x.transpose(0, 1).contiguous().transpose(0, 1)), before)
        block.feedforward.fc2.weight.mul_(1.5)
        assert not torch.allclose(block(x), before)


@pytest.mark.parametrize("part", ["norm1", "attn.proj", "feedforward.fc1", "feedforward.act"])
def test_a_hook_inside_sees_its_calls(part):
    block, x, calls = fuse(make_block()), torch.randn(2, 5, 24), []
    with torch.no_grad():
        expected = block(x)
        block.get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
    assert calls == [1]


def test_dropout_in_training_and_gradients_take_the_layers_one_by_one(monkeypatch):
    block, x, results = fuse(make_block(proj_drop=0.5)), torch.randn(2, 5, 24), spied(monkeypatch)
    block(x).sum().backward()
    assert results == []
    block.train()
    with torch.no_grad():
        assert not torch.equal(block(x), block(x))
    assert results == [None, None]
