"""Snapshots of the model for inference: one compiled call on the CPU, where nothing else would be missed."""

import copy
import io

import pytest
import timm
import torch
from support.accuracy import assert_as_accurate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ceit
from ceit import CeiT
from ceit_kernels import freeze, fuse, use_backend

SMALL = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def make_model(fused=True, **options):
    torch.manual_seed(0)
    return with_statistics(CeiT(**{**SMALL, **options}), fused)


def with_statistics(model, fused=True):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return (fuse(model) if fused else model).eval()


def images(model, batch=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, model.in_chans, *model.i2t.img_size, generator=generator).to(dtype)


@pytest.fixture
def whole_calls(monkeypatch):
    """The number of calls of whole models so far, in a list."""
    calls, infer = [0], torch.ops.ceit._model_infer

    def spy(*arguments):
        calls[0] += 1
        return infer(*arguments)

    monkeypatch.setattr(torch.ops.ceit, "_model_infer", spy)
    return calls


OPTIONS = [
    {}, {"img_size": (48, 32)}, {"img_size": 37}, {"patch_size": 2}, {"in_chans": 1}, {"in_chans": 5},
    {"num_classes": 1}, {"leff_local_size": 5}, {"leff_local_size": 7}, {"leff_with_bn": False}, {"qkv_bias": False},
    {"qk_scale": 0.3}, {"depth": 1}, {"mlp_ratio": 3.0}, {"num_heads": 4},
]  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_agrees_to_rounding_in_float64_in_one_call(options, fused, whole_calls):
    model = make_model(fused, **options).double()
    x = images(model, dtype=torch.float64)
    with torch.no_grad(), use_backend("reference"):
        expected = model(x)
    torch.testing.assert_close(freeze(model)(x), expected, rtol=1e-10, atol=1e-10)
    assert whole_calls == [1]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ceit_tiny_patch16_224", "ceit_small_patch16_224"])
@pytest.mark.parametrize("batch", [1, 3])
def test_is_as_accurate_as_plain_pytorch(name, dtype, threads, batch, whole_calls):
    torch.manual_seed(0)
    model = with_statistics(ceit.create_model(name, img_size=48, depth=3, num_classes=50, fused=False)).to(dtype)
    x, before = images(model, batch, dtype), torch.get_num_threads()
    with torch.no_grad(), use_backend("reference"):
        plain, exact = model(x), copy.deepcopy(model).double()(x.double())
    torch.set_num_threads(threads)
    try:
        found = freeze(model)(x)
    finally:
        torch.set_num_threads(before)
    assert whole_calls == [1]
    assert_as_accurate(["logits"], [found], [plain], [exact])


def test_nothing_but_one_operator_runs():
    model = make_model()
    frozen, x = freeze(model), images(model)
    frozen(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        frozen(x)
    names = {event.key for event in profile.key_averages()}
    assert "ceit::_model_infer" in names
    assert not names & {"aten::linear", "aten::addmm", "aten::mm", "aten::layer_norm", "aten::cat", "aten::add"}


def test_images_of_any_strides_give_the_same():
    model = make_model()
    frozen, x = freeze(model), images(model)
    expected = frozen(x)
    assert torch.equal(frozen(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(frozen(torch.cat((x, x), 3)[..., 32:]), expected)
    torch.testing.assert_close(frozen(x[:1].expand(3, -1, -1, -1)), expected[:1].expand(3, -1), rtol=1e-5, atol=1e-5)


def test_nothing_that_is_done_to_the_model_reaches_it():
    model = make_model().train()
    frozen, x = freeze(model), images(model)
    assert model.training
    expected = frozen(x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    model.blocks[0].register_forward_hook(lambda *_: pytest.fail("a hook of the model ran"))
    model.reset_classifier(7)
    assert torch.equal(frozen(x), expected)


def test_a_head_may_have_no_bias(whole_calls):
    model = make_model().double()
    model.head = nn.Linear(model.head.in_features, 7, bias=False).double()
    x = images(model, dtype=torch.float64)
    with torch.no_grad(), use_backend("reference"):
        expected = model(x)
    torch.testing.assert_close(freeze(model)(x), expected, rtol=1e-10, atol=1e-10)
    assert whole_calls == [1]


@pytest.mark.parametrize(
    "options",
    [{"global_pool": "avg"}, {"global_pool": ""}, {"num_classes": 0}, {"dynamic_img_size": True}],
    ids=str,
)
def test_other_models_run_by_their_parts(options, whole_calls):
    model = make_model(**options).double()
    for size in (32, 64) if "dynamic_img_size" in options else (32,):
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        with torch.no_grad(), use_backend("reference"):
            expected = model(x)
        torch.testing.assert_close(freeze(model)(x), expected, rtol=1e-10, atol=1e-10)
    assert whole_calls == [0]


def test_blocks_of_other_models_are_one_call_each_as_in_the_live_model(monkeypatch):
    from ceit_kernels.block import encoder_inference

    results = []

    def spy(*arguments):
        results.append(encoder_inference(*arguments))
        return results[-1]

    monkeypatch.setattr("ceit.encode.encoder_inference", spy)
    model = make_model(global_pool="avg")
    freeze(model)(images(model))
    assert len(results) == 1
    assert results[0] is not None


def test_features_of_blocks():
    torch.manual_seed(0)
    model = timm.create_model("ceit_tiny_patch16_224", img_size=32, depth=3, features_only=True, fused=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(freeze(model)(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["i2t.backbone.bn", "blocks.0", "blocks.1.leff.conv2", "lca.attn.proj", "norm", "head", ""]
)
def test_hooks_that_the_model_has_run(name, whole_calls):
    model, calls = make_model(), []
    model.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    freeze(model)(images(model))
    assert (calls, whole_calls) == ([1], [0])


def test_hooks_put_on_a_part_of_the_snapshot_run(whole_calls):
    model, calls = make_model(), []
    frozen, x = freeze(model), images(model)
    expected = frozen(x)
    handle = frozen.model.blocks[1].leff.bn2.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-4)
    handle.remove()
    frozen(x)
    assert (calls, whole_calls) == ([1], [2])


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["blocks.0.attn", "lca.attn"])
def test_adapters_count(name, whole_calls):
    model = make_model()
    attention = model.get_submodule(name)
    attention.qkv = Lora(attention.qkv)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(freeze(model)(x), expected, rtol=1e-4, atol=1e-4)
    assert whole_calls == [0]


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.seen += 1
        return function(*arguments, **(options or {}))


def test_modes_and_inputs_that_one_call_does_not_serve(whole_calls):
    model = make_model()
    frozen, x = freeze(model), images(model)
    with torch.no_grad():
        expected = model(x)
    with Watch() as watch:
        torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-4)
    assert watch.seen > 20
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(x).dtype == torch.bfloat16
    with use_backend("reference"):
        torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.vmap(frozen)(x[:, None])[:, 0], expected, rtol=1e-4, atol=1e-4)
    assert frozen(x[:0]).shape == (0, 5)
    with pytest.raises(TypeError, match=r"expected torch\.float32.*got torch\.float64"):
        frozen(x.double())
    with pytest.raises(ValueError, match="expected images of 32x32 pixels, got 64x64"):
        frozen(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\), got shape \(1, 1, 32, 32\)"):
        frozen(torch.randn(1, 1, 32, 32))
    assert whole_calls == [0]


@pytest.mark.parametrize(
    "record",
    [
        lambda frozen, x: torch.compile(frozen, backend="aot_eager", fullgraph=True),
        lambda frozen, x: torch.export.export(frozen, (x,)).module(),
        lambda frozen, x: torch.jit.trace(frozen, (x,)),
    ],
    ids=["compile", "export", "trace"],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_compilers_and_tracers_record_the_parts(record):
    model = make_model()
    frozen, x = freeze(model), images(model)
    with torch.no_grad():
        torch.testing.assert_close(record(frozen, x)(x), frozen(x), rtol=1e-4, atol=1e-4)


def through_a_file(module):
    memory = io.BytesIO()
    torch.save(module, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


def without_a_block(model):
    del model.blocks[0]


def without_a_norm(model):
    model.lca.norm1 = nn.Identity()


def with_norms_in_training(model):
    model.blocks[0].leff.train()


def with_a_convolution_that_has_only_a_call(model):
    model.i2t.backbone.conv = nn.Sequential(model.i2t.backbone.conv, nn.Tanh())


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [without_a_block, without_a_norm, with_norms_in_training, with_a_convolution_that_has_only_a_call]
)
def test_what_is_done_to_a_part_of_the_model_or_of_its_snapshot_is_not_ignored(change, whole_calls):
    model = make_model(fused=False).double()
    frozen, x = freeze(model), images(model, dtype=torch.float64)
    before = frozen(x)
    change(model)
    change(frozen.model)
    fused = fuse(copy.deepcopy(model))
    with use_backend("reference"):
        expected = model(x)
    assert (expected - before).abs().max() > 1e-5
    found = [fused(x), frozen(x)]
    if change is not with_norms_in_training:
        found.append(freeze(model)(x))
    for out in found:
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("copied", [through_a_file, copy.deepcopy, freeze], ids=lambda f: f.__name__)
def test_copies_compute_the_same_in_one_call(copied, whole_calls):
    model = make_model()
    frozen, x = freeze(model), images(model)
    assert torch.equal(copied(frozen)(x), frozen(x))
    assert whole_calls == [2]


def test_runs_on_the_meta_device():
    with torch.device("meta"):
        model = CeiT(**SMALL).eval()
    assert freeze(model)(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_on_a_gpu_norms_are_folded_once(cuda_graphs):
    model = make_model().cuda()
    frozen, x = freeze(model, cuda_graphs=cuda_graphs), images(model).cuda()
    with torch.no_grad(), use_backend("reference"):
        expected = model(x)
    for _ in range(2):
        torch.testing.assert_close(frozen(x), expected, rtol=1e-3, atol=1e-3)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.model.blocks.modules())
