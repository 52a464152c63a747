"""The registered operators in PyTorch's machinery, with the code for the CPU behind them."""

import pytest
import torch
from support.attention import make_call

from ceit_kernels import FusedAttention, self_attention, use_backend

HEADS, CHANNELS, TOKENS = 2, 12, 30


@pytest.fixture(autouse=True)
def on_the_cpu():
    with use_backend("attention=native"):
        yield


def make_module(**options):
    torch.manual_seed(0)
    module = FusedAttention(HEADS * CHANNELS, HEADS, qkv_bias=True, **options)
    return module, torch.randn(3, TOKENS, HEADS * CHANNELS)


@pytest.mark.parametrize("num_queries", [1, TOKENS])
def test_opcheck_of_the_forward_operator(num_queries):
    qkv, _ = make_call(2, TOKENS, HEADS, CHANNELS, torch.float32)
    check = torch.library.opcheck
    check(torch.ops.ceit.attention.default, (qkv.requires_grad_(), HEADS, 0.3, num_queries, True, "native"))
    check(torch.ops.ceit.attention.default, (qkv.detach(), HEADS, 0.3, num_queries, False, "native"))


@pytest.mark.parametrize("num_queries", [1, TOKENS])
def test_opcheck_of_the_backward_operator(num_queries):
    qkv, grad_out = make_call(2, TOKENS, HEADS, CHANNELS, torch.float32, num_queries)
    _, statistics = torch.ops.ceit.attention(qkv, HEADS, 0.3, num_queries, True, "native")
    arguments = (grad_out, qkv, statistics, HEADS, 0.3, "native")
    torch.library.opcheck(torch.ops.ceit.attention_backward.default, arguments)


@pytest.mark.parametrize("num_queries", [1, 3, None])
def test_gradients_are_those_of_finite_differences(num_queries):
    qkv = make_call(2, 5, HEADS, 3, torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda qkv: self_attention(qkv, num_heads=HEADS, scale=0.7, num_queries=num_queries), qkv
    )


def test_a_second_derivative_is_an_error_that_says_what_to_do():
    qkv = make_call(2, 5, HEADS, 3, torch.float32)[0].requires_grad_()
    (grad,) = torch.autograd.grad(self_attention(qkv, num_heads=HEADS).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match=r"self_attention is differentiable once.*reference"):
        grad.sum().backward()


def test_a_gradient_without_statistics_is_an_error_and_never_lost():
    qkv = make_call(2, 5, HEADS, 3, torch.float32)[0].requires_grad_()
    out, _ = torch.ops.ceit.attention(qkv, HEADS, 0.3, 5, False, "native")
    with pytest.raises(RuntimeError, match="expected need_statistics=True where a gradient is taken, got False"):
        out.sum().backward()


def test_nothing_is_kept_where_no_gradient_is_needed():
    qkv, _ = make_call(2, 5, HEADS, 3, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        assert not self_attention(qkv, num_heads=HEADS).requires_grad
        with torch.no_grad():
            self_attention(qkv.requires_grad_(), num_heads=HEADS)
        assert not saved
        self_attention(qkv, num_heads=HEADS)
    assert [tensor.shape for tensor in saved] == [qkv.shape, (2, HEADS, 5, 2)]


@pytest.mark.parametrize("num_queries", [1, None])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks_and_keeps_values_and_gradients(dynamic, num_queries):
    module, x = make_module()
    leaves = [x.requires_grad_(), *module.parameters()]
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    outs = module(x, num_queries), compiled(x, num_queries)
    expected, grads = (torch.autograd.grad(out.square().sum(), leaves) for out in outs)
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(grads, expected)


def test_a_compiled_module_follows_a_change_of_backend():
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    module, x = make_module()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for name in ("native", "reference", "native"):
        with use_backend(f"attention={name}"):
            compiled(x)
    assert [any("ceit.attention" in target for target in targets) for targets in graphs] == [True, False]


def test_exports_as_one_operator_that_runs_with_any_batch():
    module, x = make_module()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(module.eval(), (x,), dynamic_shapes={"x": {0: batch}})
    assert "ceit.attention" in str(exported.graph)
    for images in (x, torch.cat((x, x))):
        torch.testing.assert_close(exported.module()(images), module(images))


def test_gradient_checkpointing_gives_the_same_gradients():
    module, x = make_module()
    outs = module(x), torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    grads = [torch.autograd.grad(out.square().sum(), list(module.parameters())) for out in outs]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_autocast_computes_in_bfloat16_and_returns_float32_gradients():
    module, x = make_module()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
        with use_backend("attention=reference"):
            expected = module(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    grads = [torch.autograd.grad(o.float().square().sum(), list(module.parameters())) for o in (out, expected)]
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)


def test_autocast_reaches_a_direct_call_of_the_operator_and_spares_float64():
    for dtype, expected in ((torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        qkv = make_call(2, 5, HEADS, 3, dtype)[0].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = torch.ops.ceit.attention(qkv, HEADS, 0.3, 5, True, "native")
        assert out.dtype == expected
        (grad,) = torch.autograd.grad(out.sum(), qkv)
        assert grad.dtype == dtype
