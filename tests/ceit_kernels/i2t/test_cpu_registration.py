"""The stem's operators in PyTorch's machinery, with the code for the CPU behind them."""

import copy

import pytest
import torch
from support.stems import make_stem

from ceit import CeiT
from ceit_kernels import FusedImage2Tokens, backends, fuse, use_backend


@pytest.fixture(autouse=True)
def host_code():
    """Here the code for the CPU is meant."""
    with use_backend("i2t=native"):
        yield


def make_arguments(dtype=torch.float32, training=True, requires_grad=True):
    """Arguments of ``torch.ops.ceit.i2t``."""
    torch.manual_seed(0)
    stem = make_stem(out_chans=20, training=training).cpu().to(dtype)
    x = torch.randn(2, 3, 14, 11, dtype=dtype)
    tensors = [x, stem.conv.weight.detach(), stem.bn.weight.detach(), stem.bn.bias.detach()]
    statistics = (None, None) if training else (stem.bn.running_mean, stem.bn.running_var)
    return (*(t.requires_grad_(requires_grad) for t in tensors), *statistics, 1e-5, True, None, None, "native")


@pytest.mark.parametrize("training", [True, False])
def test_opcheck_of_the_forward_operator(training):
    arguments = make_arguments(torch.float64, training)
    torch.library.opcheck(torch.ops.ceit.i2t.default, arguments, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("need_indices", [True, False])
def test_opcheck_of_inference(need_indices):
    *arguments, _, _, _, _ = make_arguments(training=False, requires_grad=False)
    torch.library.opcheck(torch.ops.ceit.i2t.default, (*arguments, need_indices, None, None, "native"))


@pytest.mark.parametrize("need_input", [True, False])
def test_opcheck_of_the_backward_operator(need_input):
    x, weight, gamma, beta, *_ = make_arguments(requires_grad=False)
    out, indices, mean, variance, pooled = torch.ops.ceit.i2t(
        x, weight, gamma, beta, None, None, 1e-5, True, None, None, "native"
    )
    arguments = (torch.randn_like(out), x, weight, gamma, beta, indices, mean, variance, 1e-5, True, None, need_input)
    torch.library.opcheck(torch.ops.ceit.i2t_backward.default, (*arguments, "native", pooled))
    with pytest.raises(ValueError, match="pooled: expected the forward's, which"):
        torch.ops.ceit.i2t_backward(*arguments, "native")


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training):
    x, weight, gamma, beta, *rest = make_arguments(torch.float64, training)

    def call(*inputs):
        return torch.ops.ceit.i2t(*inputs, *rest)[0]

    # At gamma = 0 the place of the maximum jumps.
    gamma = torch.where(gamma == 0, 0.5, gamma).detach().requires_grad_()
    assert torch.autograd.gradcheck(call, (x, weight, gamma, beta), fast_mode=True)


def test_a_second_derivative_is_an_error_that_says_what_to_do():
    stem, x = make_stem().cpu().float(), torch.randn(2, 3, 14, 11, requires_grad=True)
    (grad,) = torch.autograd.grad(stem(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"FusedImage2Tokens is differentiable once.*reference"):
        grad.sum().backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks_and_keeps_values_gradients_and_statistics(dynamic, training):
    torch.manual_seed(0)
    stem, x = make_stem(training=training).cpu().float(), torch.randn(2, 3, 14, 11, requires_grad=True)
    results = []
    for compiled in (False, True):
        module = copy.deepcopy(stem)
        run = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager") if compiled else module
        out = run(x)
        grads = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
        results.append([out, *grads, *module.buffers()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("training", [True, False])
def test_exports(training):
    stem, x = make_stem(training=training).cpu().float(), torch.randn(2, 3, 20, 24)
    exported = torch.export.export(copy.deepcopy(stem), (x,)).module()
    torch.testing.assert_close(exported(x), stem(x))


def test_autocast_gives_its_dtype_and_float32_gradients():
    stem, x = make_stem().cpu().float(), torch.randn(2, 3, 14, 11)
    with torch.autocast("cpu", torch.bfloat16):
        out = stem(x)
        with use_backend("i2t=reference"):
            plain = copy.deepcopy(stem)(x)
    assert out.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(out, plain, rtol=3e-2, atol=6e-2)
    out.float().sum().backward()
    assert {p.grad.dtype for p in stem.parameters()} == {torch.float32}


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
def test_running_statistics_are_those_of_batchnorm(momentum):
    torch.manual_seed(1)
    stem = FusedImage2Tokens(3, 32).double()
    stem.bn.momentum = momentum
    plain = copy.deepcopy(stem)
    for _ in range(3):
        x = torch.randn(2, 3, 14, 11, dtype=torch.float64)
        with torch.no_grad():
            stem(x)
            with use_backend("i2t=reference"):
                plain(x)
    torch.testing.assert_close(stem.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_without_affine_and_without_running_statistics(training):
    stem = FusedImage2Tokens(3, 32).double().train(training)
    stem.bn = torch.nn.BatchNorm2d(32, affine=False, track_running_stats=False).double().train(training)
    x = torch.randn(2, 3, 14, 11, dtype=torch.float64)
    results = []
    for backend in ("native", "reference"):
        with use_backend(f"i2t={backend}"):
            out = stem(x)
            results.append([out, *torch.autograd.grad(out.square().sum(), [stem.conv.weight])])
    torch.testing.assert_close(*results)


def test_a_single_value_per_channel_is_refused_in_training():
    with pytest.raises(ValueError, match="more than one value per channel"):
        FusedImage2Tokens(3, 32)(torch.randn(1, 3, 1, 1))


def test_an_empty_batch_is_left_to_plain_pytorch():
    x = torch.zeros(0, 3, 20, 24)
    with use_backend("auto"):
        assert FusedImage2Tokens().eval()(x).shape == (0, 64, 5, 6)
    with pytest.raises(backends.BackendError, match="the batch is empty"):
        FusedImage2Tokens().eval()(x)


def test_other_dtypes_are_left_to_plain_pytorch():
    stem, x = make_stem().cpu().half(), torch.randn(2, 3, 14, 11).half()
    with pytest.raises(backends.BackendError, match=r"float32, bfloat16 and float64, not in torch\.float16"):
        stem(x)
    with use_backend("auto"):
        assert stem(x).dtype == torch.float16


def test_auto_takes_the_code_for_the_cpu():
    with use_backend("auto"):
        assert backends.choose("i2t", torch.zeros(1), torch.float32).backend == "native"


def test_training_keeps_the_pooled_map_and_a_byte_of_its_place():
    stem, x, kept = make_stem().cpu().float(), torch.randn(2, 3, 64, 64), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = stem(x)
    for tensor in (x, out, *stem.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    statistics = 2 * 32 * 4
    assert sum(kept.values()) == out.numel() * (4 + 1) + statistics


@pytest.mark.parametrize("training", [True, False])
def test_a_model_computes_what_the_plain_one_does(training):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        options = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
        model = CeiT(**options).double().train(training)
        if fused:
            fuse(model, leff=False, lca=False, add_norm=False, linear=False)
        logits = model(images)
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True)
        results.append([logits, [g for g in gradients if g is not None], *model.buffers()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)
