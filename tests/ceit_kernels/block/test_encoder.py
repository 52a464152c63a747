"""Encoder blocks in one call each on the CPU: the same as their operators, and only where nobody would notice."""

import copy

import pytest
import torch
from support.accuracy import assert_as_accurate
from torch import nn

from ceit.blocks import Block
from ceit_kernels import fuse, use_backend
from ceit_kernels.block import EncoderParts, encoder_inference


def make_block(dtype=torch.float32, seed=0, dim=24, heads=3, **options) -> Block:
    torch.manual_seed(seed)
    block = Block(dim, heads, **options)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return block.to(dtype).eval()


def make_tokens(batch=3, grid=(4, 5), dtype=torch.float32):
    return torch.randn(batch, 1 + grid[0] * grid[1], 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def parts_of(block: Block) -> EncoderParts:
    return EncoderParts(block.norm1, block.attn, block.norm2, block.leff)


def run_fused(block: Block, x, grid_size=(4, 5)):
    with torch.no_grad():
        found = encoder_inference(x, [block], parts_of, grid_size)
    return None if found is None else found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 5])
def test_is_as_accurate_as_plain_pytorch(dtype, batch):
    plain, x = make_block(dtype, qkv_bias=True), make_tokens(batch, dtype=dtype)
    with torch.no_grad():
        expected, exact = plain(x, (4, 5)), copy.deepcopy(plain).double()(x.double(), (4, 5))
    assert_as_accurate(["tokens"], [run_fused(fuse(plain), x)], [expected], [exact])


@pytest.mark.parametrize("class_token_only", [False, True])
@pytest.mark.parametrize(("batch", "dim", "heads"), [(1, 24, 3), (3, 100, 2)])
def test_under_autocast_is_as_accurate_as_plain_pytorch_and_of_its_dtype(class_token_only, batch, dim, heads):
    plain = make_block(dim=dim, heads=heads, qkv_bias=True)
    x = torch.randn(batch, 21, dim)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double(), (4, 5), class_token_only)
        with torch.autocast("cpu", torch.bfloat16):
            expected = plain(x, (4, 5), class_token_only)
            out, class_tokens = encoder_inference(x, [fuse(plain)], parts_of, (4, 5), class_token_only)
    assert_as_accurate(["tokens", "class token"], [out, out[:, 0]], [expected, expected[:, 0]], [exact, exact[:, 0]])
    assert torch.equal(class_tokens[:, 0], out[:, 0])


@pytest.mark.parametrize(
    ("options", "batch", "grid"),
    [
        ({}, 1, (1, 1)),
        ({"qkv_bias": True, "kernel_size": 5}, 2, (3, 7)),
        ({"with_bn": False, "kernel_size": 7, "mlp_ratio": 1.4}, 7, (2, 2)),
        ({"qk_scale": 0.3, "mlp_ratio": 3.0}, 4, (5, 1)),
    ],
)
def test_agrees_to_rounding_in_float64(options, batch, grid):
    plain, x = make_block(torch.float64, **options), make_tokens(batch, grid, torch.float64)
    with torch.no_grad():
        expected = plain(x, grid)
    torch.testing.assert_close(run_fused(fuse(plain), x, grid), expected, rtol=1e-11, atol=1e-11)


def test_takes_tokens_of_any_strides():
    block, x = fuse(make_block(torch.float64)), make_tokens(dtype=torch.float64)
    scattered = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run_fused(block, scattered), run_fused(block, x))
    expanded = x[:1].expand(3, -1, -1)
    torch.testing.assert_close(run_fused(block, expanded)[2], run_fused(block, x[:1])[0], rtol=1e-12, atol=1e-12)


def test_the_block_runs_it(monkeypatch):
    block, x, results = fuse(make_block(torch.float64)), make_tokens(7, dtype=torch.float64), []

    def spy(*arguments):
        results.append(encoder_inference(*arguments))
        return results[-1]

    monkeypatch.setattr("ceit.blocks.encoder_inference", spy)
    with torch.no_grad():
        out = block(x, (4, 5))
    assert out is results[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("class_token_only", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_several_blocks_give_the_class_token_of_each(dtype, class_token_only, batch):
    blocks = [fuse(make_block(dtype, qkv_bias=True, seed=seed)) for seed in range(3)]
    x = expected = make_tokens(batch, dtype=dtype)
    with torch.no_grad():
        class_tokens = []
        for block in blocks:
            expected = run_fused(block, expected)
            class_tokens.append(expected[:, 0])
        result = encoder_inference(x, blocks, parts_of, (4, 5), class_token_only)
    if class_token_only:
        expected = expected[:, :1]
    out, found = result
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, torch.stack(class_tokens, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("dim", "heads", "grid", "mlp_ratio"),
    [(24, 3, (4, 5), 2.3), (100, 2, (7, 3), 2.3), (192, 3, (14, 14), 4), (40, 2, (3, 3), 1.2)],
    ids=["odd hidden features", "wide", "tiny", "narrow"],
)
def test_panels_of_any_width_on_any_number_of_threads(dtype, threads, dim, heads, grid, mlp_ratio):
    plain = make_block(dtype, dim=dim, heads=heads, mlp_ratio=mlp_ratio)
    x = torch.randn(3, 1 + grid[0] * grid[1], dim).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            expected, exact = plain(x, grid), copy.deepcopy(plain).double()(x.double(), grid)
        assert_as_accurate(["tokens"], [run_fused(fuse(plain), x, grid)], [expected], [exact])
    finally:
        torch.set_num_threads(before)


def test_follows_whatever_is_written_to_a_weight_or_put_in_its_place():
    block, x = fuse(make_block()), make_tokens()
    with torch.no_grad():
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if not tensor.is_floating_point() or name.endswith("conv1.bias"):  # the first norm is not far from it
                continue
            before = run_fused(block, x)
            tensor.data.numpy()[...] *= 1.5
            assert not torch.allclose(run_fused(block, x), before, rtol=1e-6, atol=1e-6), name
            owner, _, last = name.rpartition(".")
            setattr(block.get_submodule(owner), last, type(tensor)(tensor.clone()))
            expected = block.train().eval()(x, (4, 5))
            assert torch.equal(run_fused(block, x), expected), name


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_declines_where_someone_would_notice():
    block, x = fuse(make_block()), make_tokens()
    assert run_fused(block, x) is not None
    assert encoder_inference(x, [block], parts_of, (4, 5)) is None  # gradients
    with torch.no_grad():
        assert encoder_inference(x, [block], lambda _: None, (4, 5)) is None  # a block that does more
    with Watching():
        assert run_fused(block, x) is None
    with torch.autocast("cpu", torch.float16):
        assert run_fused(block, x) is None
    for operator in ("add_norm", "linear", "attention", "leff"):
        with use_backend(f"{operator}=reference"):
            assert run_fused(block, x) is None
    for module in (block.norm1, block.attn, block.attn.proj, block.leff, block.leff.bn1):
        handle = module.register_forward_hook(lambda *_: None)
        assert run_fused(block, x) is None, module
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert run_fused(block, x) is None
    handle.remove()
    block.attn.proj_drop.p = block.attn.attn_drop.p = 0.5
    for module in (block.attn, block.attn.proj_drop, block.leff, block.leff.bn3):
        module.train()
        assert run_fused(block, x) is None, module
        module.eval()
    assert run_fused(block, x.double()) is None
    assert run_fused(block, x[:0]) is None
    assert run_fused(make_block(), x) is None  # plain


def test_a_hook_inside_the_block_sees_its_calls():
    block, x, calls = fuse(make_block()), make_tokens(), []
    with torch.no_grad():
        expected = block(x, (4, 5))
        block.attn.qkv.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(block(x, (4, 5)), expected, rtol=1e-5, atol=1e-5)
    assert calls == [1]


def test_a_grid_that_the_tokens_do_not_make_is_an_error():
    with pytest.raises(ValueError, match="x: expected 1 prefix and grid_size 4 \\* 4 = 16 patch tokens, got 21"):
        run_fused(fuse(make_block()), make_tokens(), (4, 4))
