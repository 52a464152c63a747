"""``ceit::leff`` and ``ceit::leff_backward`` in PyTorch's machinery."""

import copy

import pytest
import torch
from support.leff import make_leff, make_tokens, make_training_leff, run, train_step
from support.where import DEVICE

from ceit.recompute import checkpoint_module
from ceit_kernels import BatchNorm, leff_block, use_backend
from ceit_kernels.leff.arguments import Settings
from ceit_kernels.leff.functional import pack
from ceit_kernels.leff.norms import norm_mode, of_module

pytestmark = pytest.mark.kernels(ttsem=False)

GRID = (2, 3)


def make_tiny(dtype=torch.float32, norms="bbb", **options):
    return make_training_leff(4, 6, 4, 3, dtype, 1, norms, **options)


def make_arguments(norms, **options):
    """Arguments of ``torch.ops.ceit.leff``."""
    module = make_tiny(norms=norms, **options)
    convolutions = (module.conv1, module.conv2, module.conv3)
    norms = [of_module(norm) for norm in (module.bn1, module.bn2, module.bn3)]
    norms = [n._replace(running_mean=None, running_var=None) if n and n.training else n for n in norms]
    x, residual = (make_tokens(2, 7, 4, torch.float32, seed=seed).requires_grad_() for seed in (0, 1))
    parameters = pack([c.weight for c in convolutions], [c.bias for c in convolutions], norms)
    modes = [norm_mode(norm) for norm in norms]
    settings = Settings([1e-5] * 3, modes, *GRID, 1, ["gelu", "silu"], None, None, "triton")
    return x, parameters, residual, settings


@pytest.mark.parametrize("backend", ["triton", "library"])
def test_opcheck(backend):
    x, parameters, residual, settings = make_arguments("bfn", bias=False)
    settings = settings._replace(backend=backend)
    arguments = (x, *parameters, residual, *settings)
    torch.library.opcheck(torch.ops.ceit.leff.default, arguments)
    with torch.no_grad():
        out, *saved = torch.ops.ceit.leff(*arguments)
    needs = [p is not None and i % 5 != 2 for i, p in enumerate(parameters) if i % 6 < 4]
    parameters = [None if p is None else p.detach() for p in parameters]
    arguments = (torch.ones_like(out), x.detach(), *parameters, *saved, *settings, True, needs)
    torch.library.opcheck(torch.ops.ceit.leff_backward.default, arguments)
    arguments = x.detach(), *parameters, None, *settings
    torch.library.opcheck(torch.ops.ceit.leff_statistics.default, arguments)


@pytest.mark.parametrize("norms", ["training", "eval", "none"])
def test_gradcheck(norms):
    shapes = [(6, 4, 1, 1), (6, 1, 3, 3), (4, 6, 1, 1), (6,), (6,), (4,), *([(6,), (6,), (4,)] * 2)]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    generator = torch.Generator().manual_seed(0)
    # One vector of all parameters, whose derivative takes one step of finite differences.
    vector = torch.randn(sum(sizes), generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()
    x, residual = (make_tokens(2, 5, 4, torch.float64, seed=seed).requires_grad_() for seed in (0, 1))

    def call(x, residual, vector):
        tensors = [part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
        statistics = [(torch.zeros_like(t), torch.ones_like(t)) for t in tensors[3:6]]
        batch_norms = [
            BatchNorm(*pair, weight, bias, training=norms == "training")
            for pair, weight, bias in zip(statistics, tensors[6:9], tensors[9:], strict=True)
        ]
        batch_norms = (None,) * 3 if norms == "none" else batch_norms
        return leff_block(x, tensors[:3], tensors[3:6], batch_norms, num_prefix_tokens=1, residual=residual)

    with use_backend("leff=triton"):
        assert torch.autograd.gradcheck(call, (x, residual, vector), fast_mode=True)


def test_a_second_derivative_is_an_error_that_says_what_to_do():
    module, x = make_tiny(), make_tokens(2, 7, 4, torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(run("triton", module, x, GRID).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"leff_block is differentiable once.*reference"):
        grad.sum().backward()
    # Neither x nor the gradient of the result depends on anything here, only the parameters do.
    out = run("triton", module, x.detach(), GRID)
    (grad,) = torch.autograd.grad(out.sum(), module.conv1.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks_and_keeps_values_gradients_and_statistics(dynamic):
    module = make_tiny()
    module.bn2.momentum = None
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for height in (2, 3):
        x, grad_out = (make_tokens(2, 1 + 3 * height, 4, torch.float32, seed=height + seed) for seed in (0, 1))
        expected = train_step("triton", module, x, grad_out, (height, 3))
        found = train_step("triton", compiled, x, grad_out, (height, 3))
        found = {name.replace("_orig_mod.", ""): tensor for name, tensor in found.items()}
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_checkpointing_keeps_values_gradients_and_statistics(compiled):
    module = make_tiny()
    x, grad_out = (make_tokens(2, 7, 4, torch.float32, seed=seed) for seed in (0, 1))
    expected = train_step("triton", copy.deepcopy(module), x, grad_out, GRID)

    def call(*args):
        return checkpoint_module(module, *args)

    call = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    with use_backend("leff=triton"):
        call(x, GRID).backward(grad_out)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"{name}.grad"], rtol=0, atol=0)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, expected[name], rtol=1e-6, atol=1e-7)


def test_autocast_reaches_a_direct_call_of_the_operator():
    x, parameters, _, settings = make_arguments("bbb")
    with torch.autocast(DEVICE, torch.float16):
        out, z1, *_ = torch.ops.ceit.leff(x, *parameters, None, *settings)
    assert (out.dtype, z1.dtype) == (torch.float32, torch.float16)
    (grad,) = torch.autograd.grad(out.sum(), parameters[0])
    assert grad.dtype == torch.float32


def test_outputs_share_no_memory():
    for norms in ("bbb", "fff", "nnn"):
        x, parameters, residual, settings = make_arguments(norms)
        outputs = torch.ops.ceit.leff(x, *parameters, residual, *settings)
        pointers = [t.untyped_storage().data_ptr() for t in (*outputs, x, residual) if t.numel()]
        assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("images", ["channels-last", "contiguous"])
@pytest.mark.parametrize(("layout", "training"), [("NHWC", True), ("NCHW", True), ("NCHW", False)])
def test_images_are_tokens_in_another_shape(layout, training, images):
    options = {"norms": "nnn", "first_act": False, "bias": False}
    module = make_training_leff(4, 6, 8, 3, torch.float64, 0, layout=layout, **options).requires_grad_(training)
    plain = make_training_leff(4, 6, 8, 3, torch.float64, 0, **options).requires_grad_(training)
    x, residual = (make_tokens(2, 6, size, torch.float64, seed=size) for size in (4, 8))
    expected = run("reference", plain, x, GRID, residual).unflatten(1, GRID)
    x, residual = (t.unflatten(1, GRID) for t in (x, residual))
    if layout == "NCHW":
        expected, x, residual = (t.permute(0, 3, 1, 2) for t in (expected, x, residual))
    if images == "contiguous":
        x, residual = x.contiguous(), residual.contiguous()
    out = run("triton", module, x, None, residual)
    torch.testing.assert_close(out, expected)
    memory_format = torch.channels_last if images == "channels-last" else torch.contiguous_format
    assert layout == "NHWC" or out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(run("reference", module, x, None, residual), expected)


@pytest.mark.gpu
def test_a_training_step_is_captured_in_a_cuda_graph():
    module = make_training_leff(32, 64, 32, 3, torch.float32)
    plain = copy.deepcopy(module)
    x, grad_out = (make_tokens(4, 17, 32, torch.float32, seed=seed) for seed in (0, 1))
    with use_backend("leff=triton"):
        step = torch.cuda.make_graphed_callables(module, (x.clone().requires_grad_(),))
    for target in (module, plain):
        for norm in (target.bn1, target.bn2, target.bn3):
            norm.reset_running_stats()
    module.zero_grad()
    for _ in range(2):
        expected = train_step("triton", plain, x, grad_out)
        out = step(x.clone().requires_grad_())
        out.backward(grad_out)
        torch.testing.assert_close(out, expected["out"])
        torch.testing.assert_close(module.conv1.weight.grad, expected["conv1.weight.grad"])
        module.zero_grad()
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name))


@pytest.mark.gpu
def test_a_step_is_replayed_on_the_current_stream_of_each_gpu():
    for i in range(torch.cuda.device_count()):
        module = make_training_leff(32, 64, 32, 3, torch.float32).to(f"cuda:{i}")
        x, grad_out = (make_tokens(4, 17, 32, torch.float32, seed=seed).to(f"cuda:{i}") for seed in (0, 1))
        expected = train_step("triton", copy.deepcopy(module), x, grad_out)
        for stream in (torch.cuda.default_stream(i), torch.cuda.Stream(i)):
            stream.wait_stream(torch.cuda.default_stream(i))
            with torch.cuda.stream(stream):
                replayed = train_step("triton", copy.deepcopy(module), x, grad_out)
            stream.synchronize()
            torch.testing.assert_close(replayed, expected, rtol=0, atol=0)


def test_inference_takes_the_mix_ffn_too():
    module = make_leff(4, 6, 4, 3, torch.float64, 0, with_bn=False, first_act=False, bias=False)
    x = make_tokens(2, 6, 4, torch.float64)
    torch.testing.assert_close(run("triton", module, x, GRID), run("reference", module, x, GRID))
