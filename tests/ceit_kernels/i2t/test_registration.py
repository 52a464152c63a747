"""The registered operators in PyTorch's machinery, with the compiled kernels behind them."""

import copy

import pytest
import torch
from support.stems import make_stem
from support.where import DEVICE, ON_GPU

from ceit_kernels import BackendError, FusedImage2Tokens, use_backend
from ceit_kernels.i2t import functional

pytestmark = pytest.mark.usefixtures("native")

# The host also computes in float64.
EXACT = torch.float32 if ON_GPU else torch.float64


def make_arguments(dtype=torch.float32, training=True, requires_grad=True):
    """Arguments of ``torch.ops.ceit.i2t``."""
    torch.manual_seed(0)
    stem = make_stem(training=training).to(dtype)
    x = torch.randn(2, 3, 14, 11, dtype=dtype, device=DEVICE)
    tensors = [x, stem.conv.weight.detach(), stem.bn.weight.detach(), stem.bn.bias.detach()]
    statistics = (None, None) if training else (stem.bn.running_mean, stem.bn.running_var)
    return (*(t.requires_grad_(requires_grad) for t in tensors), *statistics, 1e-5, True, None, None, "native")


@pytest.mark.parametrize("training", [True, False])
def test_opcheck_of_the_forward_operator(training):
    torch.library.opcheck(torch.ops.ceit.i2t.default, make_arguments(EXACT, training), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("need_input", [True, False])
def test_opcheck_of_the_backward_operator(need_input):
    x, weight, gamma, beta, *_ = make_arguments(requires_grad=False)
    out, indices, mean, variance, _ = torch.ops.ceit.i2t(
        x, weight, gamma, beta, None, None, 1e-5, True, None, None, "native"
    )
    arguments = (torch.randn_like(out), x, weight, gamma, beta, indices, mean, variance, 1e-5, True, None, need_input)
    torch.library.opcheck(torch.ops.ceit.i2t_backward.default, (*arguments, "native"))


@pytest.mark.skipif(ON_GPU, reason="needs float64, in which only the host computes")
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training):
    x, weight, gamma, beta, *rest = make_arguments(torch.float64, training)

    def call(*inputs):
        return torch.ops.ceit.i2t(*inputs, *rest)[0]

    # At gamma = 0 the place of the maximum jumps.
    gamma = torch.where(gamma == 0, 0.5, gamma).detach().requires_grad_()
    assert torch.autograd.gradcheck(call, (x, weight, gamma, beta), fast_mode=True)


def test_a_second_derivative_is_an_error_that_says_what_to_do():
    stem, x = make_stem().float(), torch.randn(2, 3, 14, 11, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(stem(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"FusedImage2Tokens is differentiable once.*reference"):
        grad.sum().backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks_and_keeps_values_gradients_and_statistics(dynamic, training):
    torch.manual_seed(0)
    stem = make_stem(training=training).float()
    x = torch.randn(2, 3, 14, 11, device=DEVICE, requires_grad=True)
    results = []
    for compiled in (False, True):
        module = copy.deepcopy(stem)
        run = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager") if compiled else module
        out = run(x)
        grads = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
        results.append([out, *grads, *module.buffers()])
    torch.testing.assert_close(*results)


def test_autocast_gives_its_dtype_and_float32_gradients():
    stem, x = make_stem().float(), torch.randn(2, 3, 14, 11, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = stem(x)
        with use_backend("i2t=reference"):
            plain = copy.deepcopy(stem)(x)
    assert out.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(out, plain, rtol=3e-2, atol=6e-2)
    out.float().sum().backward()
    assert {p.grad.dtype for p in stem.parameters()} == {torch.float32}


def test_autocast_reads_a_float32_image_as_its_rounding():
    stem, x = make_stem().float(), torch.randn(2, 3, 14, 11, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16), torch.no_grad():
        torch.testing.assert_close(stem(x), stem(x.half()), rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
def test_running_statistics_are_those_of_batchnorm(momentum):
    torch.manual_seed(1)
    stem = FusedImage2Tokens(3, 32).to(DEVICE, EXACT)
    stem.bn.momentum = momentum
    plain = copy.deepcopy(stem)
    for _ in range(3):
        x = torch.randn(2, 3, 14, 11, dtype=EXACT, device=DEVICE)
        with torch.no_grad():
            stem(x)
            with use_backend("i2t=reference"):
                plain(x)
    torch.testing.assert_close(stem.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


KEPT = {
    "as they are": (lambda bn: None, True),
    "strided": (lambda bn: setattr(bn, "running_var", bn.running_var.repeat_interleave(2)[::2]), False),
    "counted in 32 bits": (lambda bn: setattr(bn, "num_batches_tracked", bn.num_batches_tracked.int()), False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("change", "in_the_call"), KEPT.values(), ids=KEPT)
def test_an_eager_call_averages_running_statistics_that_the_kernel_can_write(monkeypatch, dtype, change, in_the_call):
    torch.manual_seed(1)
    stem, x = make_stem().to(dtype), torch.randn(2, 3, 14, 11, device=DEVICE).to(dtype)
    plain, found = copy.deepcopy(stem).double(), []
    separate = copy.deepcopy(stem)
    change(stem.bn)
    average = functional._update_running_statistics
    monkeypatch.setattr(functional, "_update_running_statistics", lambda *call: (found.append(call), average(*call)))
    versions = [buffer._version for buffer in stem.bn.buffers()]  # of the counter alone changes, as in plain PyTorch
    stem(x)
    with use_backend("i2t=reference"):
        plain(x.double())
    assert bool(found) is not in_the_call
    assert [b._version - version for b, version in zip(stem.bn.buffers(), versions, strict=True)] == [0, 0, 1]
    for ours, exact in zip(stem.bn.buffers(), plain.bn.buffers(), strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=0.02, atol=0.02)
    # Of the same moments, PyTorch averages to rounding the same.
    monkeypatch.setattr(functional, "_for_one_launch", lambda *_: None)
    separate(x)
    tolerance = 4 * torch.finfo(dtype).eps
    for ours, apart in zip(stem.bn.buffers(), separate.bn.buffers(), strict=True):
        torch.testing.assert_close(ours.double(), apart.double(), rtol=tolerance, atol=tolerance / 100)


def test_without_affine_and_without_running_statistics():
    stem = FusedImage2Tokens(3, 32).to(DEVICE, EXACT)
    stem.bn = torch.nn.BatchNorm2d(32, affine=False, track_running_stats=False).to(DEVICE, EXACT)
    x = torch.randn(2, 3, 14, 11, dtype=EXACT, device=DEVICE)
    for mode in (True, False):
        out = stem.train(mode)(x)
        with use_backend("i2t=reference"):
            torch.testing.assert_close(out, stem(x), rtol=1e-3, atol=1e-3)


def test_a_single_value_per_channel_is_refused_in_training():
    with pytest.raises(ValueError, match="more than one value per channel"):
        FusedImage2Tokens(3, 32).to(DEVICE)(torch.randn(1, 3, 1, 1, device=DEVICE))


@pytest.mark.parametrize(
    ("arguments", "size", "reason"),
    [
        ((5, 32), (8, 8), "up to 4 channels, x has 5"),
        ((3, 48), (8, 8), r"\(32, 64, 96\) channels, not 48"),
        ((3, 32, 5), (8, 8), "7 x 7 pixels"),
        ((3, 32, 7, 1), (8, 8), r"stride=\(2, 2\) in conv, not \(1, 1\)"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_with_the_reason_and_left_to_plain_pytorch(arguments, size, reason):
    stem = FusedImage2Tokens(*arguments).to(DEVICE)
    x = torch.randn(2, arguments[0], *size, device=DEVICE)
    with pytest.raises(BackendError, match=reason):
        stem(x)
    with use_backend("i2t=auto"):
        assert stem(x).shape[1] == arguments[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 3, 14)}, r"x: expected shape \(B, I, H, W\), got \(2, 3, 14\)"),
        ({1: torch.zeros(32, 4, 7, 7)}, r"weight: expected shape \(O, 3, 7, 7\), got \(32, 4, 7, 7\)"),
        ({2: torch.zeros(31)}, r"gamma: expected shape \(32\), got \(31,\)"),
        ({4: torch.zeros(32)}, "variance: expected with mean"),
    ],
)
def test_wrong_arguments_of_a_direct_call_are_named(change, message):
    arguments = list(make_arguments(requires_grad=False))
    for position, value in change.items():
        arguments[position] = value.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        torch.ops.ceit.i2t(*arguments)


@pytest.mark.gpu
def test_is_captured_in_a_cuda_graph():
    stem = make_stem().float()
    x = torch.randn(4, 3, 32, 32, device="cuda", requires_grad=True)
    expected = copy.deepcopy(stem)(x)
    step = torch.cuda.make_graphed_callables(copy.deepcopy(stem), (x,))
    out = step(x)
    out.sum().backward()
    torch.testing.assert_close(out, expected)


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    stem = make_stem(training=False).float()
    x = torch.randn(64, 3, 224, 224, device="cuda")
    expected = stem(x).detach()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        late = torch.empty_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        out = stem(late)
    stream.synchronize()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_offsets_pass_two_to_the_31():
    stem = make_stem(out_chans=96, training=False).bfloat16()
    x = torch.zeros(1, 3, 224, 224, device="cuda", dtype=torch.bfloat16).expand(7500, -1, -1, -1)
    with torch.no_grad():
        out = stem(x)
    assert out.numel() > 2**31
    torch.testing.assert_close(out[-1], out[0], rtol=0, atol=0)


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_a_gpu():
    from ceit_kernels import backends

    with use_backend("i2t=auto"):
        assert backends.choose("i2t", torch.zeros(1, device="cuda"), torch.bfloat16).backend == "native"
