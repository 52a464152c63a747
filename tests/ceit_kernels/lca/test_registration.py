"""The registered operators in PyTorch's machinery, with the Triton kernels behind them."""

import pytest
import torch
from support.where import DEVICE

from ceit_kernels import FusedLCAAttention, lca_attention, use_backend

pytestmark = pytest.mark.kernels(ttsem=False)

BATCH, LAYERS, CHANNELS, HEADS = 3, 5, 32, 2


def make_arguments(dtype=torch.float32, dropout_p=0.0, requires_grad=True):
    """Arguments of ``torch.ops.ceit.lca``."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(*shape, generator=generator, dtype=dtype).to(DEVICE).requires_grad_(requires_grad)
        for shape in ((BATCH, LAYERS, CHANNELS), (3 * CHANNELS, CHANNELS), (3 * CHANNELS,))
    ]
    seed = torch.tensor([5], device=DEVICE)
    return (*tensors, seed, HEADS, 0.25, dropout_p, True, None, "triton")


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_of_the_forward_operator(bias, dropout_p):
    x, weight, qkv_bias, *rest = make_arguments(dropout_p=dropout_p)
    torch.library.opcheck(torch.ops.ceit.lca.default, (x, weight, qkv_bias if bias else None, *rest))


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
def test_opcheck_of_the_backward_operator(needed):
    *tensors, heads, scale, dropout_p, _, dtype, backend = make_arguments(requires_grad=False)
    arguments = (*tensors, *(None,) * 4, heads, scale, dropout_p, dtype)
    grad_out = torch.randn(BATCH, 1, CHANNELS, device=DEVICE)
    torch.library.opcheck(torch.ops.ceit.lca_backward.default, (grad_out, *arguments, *needed, backend))


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_gradcheck(scale, dropout_p):
    tensors = make_arguments(torch.float64)[:3]
    options = {"num_heads": HEADS, "scale": scale, "dropout_p": dropout_p, "seed": torch.tensor([9], device=DEVICE)}
    with use_backend("lca=triton"):
        assert torch.autograd.gradcheck(lambda *inputs: lca_attention(*inputs, **options), tensors, fast_mode=True)
    with use_backend("lca=reference"):
        assert torch.autograd.gradgradcheck(lambda *inputs: lca_attention(*inputs, **options), tensors, fast_mode=True)


def test_a_second_derivative_is_an_error_that_says_what_to_do():
    tensors = make_arguments()[:3]
    with use_backend("lca=triton"):
        out = lca_attention(*tensors, num_heads=HEADS)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"lca_attention is differentiable once.*reference"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks_and_keeps_values_and_gradients(dynamic):
    torch.manual_seed(0)
    module = FusedLCAAttention(CHANNELS, HEADS, qkv_bias=True).to(DEVICE)
    x = torch.randn(BATCH, LAYERS, CHANNELS, device=DEVICE, requires_grad=True)
    leaves = [x, *module.parameters()]
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with use_backend("lca=triton"):
        eager_out, out = module(x), compiled(x)
    eager_grads, grads = (torch.autograd.grad(o.square().sum(), leaves) for o in (eager_out, out))
    torch.testing.assert_close([out, *grads], [eager_out, *eager_grads])


def test_a_compiled_module_follows_a_change_of_backend():
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    module = FusedLCAAttention(CHANNELS, HEADS).to(DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = torch.randn(BATCH, LAYERS, CHANNELS, device=DEVICE)
    for name in ("triton", "reference", "triton"):
        with use_backend(f"lca={name}"):
            compiled(x)
    uses_operator = [any("ceit.lca" in target for target in targets) for targets in graphs]
    assert uses_operator == [True, False]


def test_dropout_differs_between_calls_of_a_compiled_module():
    module = FusedLCAAttention(CHANNELS, HEADS, attn_drop=0.5).to(DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, LAYERS, CHANNELS, device=DEVICE)
    with use_backend("lca=triton"):
        assert not torch.equal(compiled(x), compiled(x))


def test_exports_as_one_operator_that_runs():
    module = FusedLCAAttention(CHANNELS, HEADS, qkv_bias=True).to(DEVICE).eval()
    x = torch.randn(BATCH, LAYERS, CHANNELS, device=DEVICE)
    with use_backend("lca=triton"):
        exported = torch.export.export(module, (x,))
        expected = module(x)
    assert "ceit.lca" in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), expected)


def test_gradient_checkpointing_replays_the_dropout():
    module = FusedLCAAttention(CHANNELS, HEADS, attn_drop=0.5).to(DEVICE)
    x = torch.randn(BATCH, LAYERS, CHANNELS, device=DEVICE)
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        with use_backend("lca=triton"):
            out = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
            grads.append(torch.autograd.grad(out.square().sum(), list(module.parameters())))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_autocast_reaches_a_direct_call_of_the_operator():
    arguments = make_arguments()
    with torch.autocast(DEVICE, torch.float16):
        out, *_ = torch.ops.ceit.lca(*arguments)
    assert out.dtype == torch.float16
    (grad,) = torch.autograd.grad(out.sum(), arguments[1])
    assert grad.dtype == torch.float32


@pytest.mark.gpu
def test_is_captured_in_a_cuda_graph_with_its_dropout():
    module = FusedLCAAttention(CHANNELS, HEADS, attn_drop=0.5).cuda()
    x = torch.randn(BATCH, LAYERS, CHANNELS, device="cuda", requires_grad=True)
    step = torch.cuda.make_graphed_callables(module, (x,))
    outs = []
    for _ in range(2):
        out = step(x)
        out.sum().backward()
        outs.append(out.clone())
    assert torch.isfinite(outs[0]).all()
    assert not torch.equal(*outs)
