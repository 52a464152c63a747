"""The registered operators in PyTorch's machinery, with the Triton kernels behind them."""

import pytest
import torch
from support.where import DEVICE
from torch import nn

from ceit_kernels import BackendError, FusedAddNorm, add_layer_norm, use_backend
from ceit_kernels.add_norm.triton import TICKETS

pytestmark = pytest.mark.kernels(ttsem=False)

SHAPE = (2, 5, 24)


def make_tensors(dtype=torch.float32, branch=True, requires_grad=True):
    """x, branch, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = (SHAPE, SHAPE if branch else None, SHAPE[2:], SHAPE[2:])
    return [
        None
        if shape is None
        else torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE).requires_grad_(requires_grad)
        for shape in shapes
    ]


class Chain(nn.Module):
    """Two residual connections, as a block has them."""

    def __init__(self):
        super().__init__()
        self.add_norm = FusedAddNorm()
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.linear = nn.Linear(24, 24)

    def forward(self, x):
        x, y, first = self.add_norm(x, None, self.norm1, 1)
        x, y = self.add_norm(x, self.linear(y), self.norm2)
        return x + y, first


def loss_of(results):
    return sum((t * torch.linspace(-1, 1, t.numel(), device=t.device).view(t.shape)).square().sum() for t in results)


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("prefix", [0, 2, -2])
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=str)
def test_opcheck_of_the_forward_operator(branch, prefix, out_dtype):
    dtype = torch.float32 if out_dtype is None else torch.float16
    arguments = (*make_tensors(dtype, branch), 1e-6, prefix, True, out_dtype, "triton")
    torch.library.opcheck(torch.ops.ceit.add_norm.default, arguments)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)], ids=str)
@pytest.mark.parametrize(("others", "last"), [(True, False), (True, True), (False, False)])
def test_opcheck_of_the_backward_operator(needs, others, last):
    total, grad_out, weight, bias = make_tensors(requires_grad=False)
    rest = (torch.randn_like(total), torch.randn_like(total[:, :2])) if others else (None, None)
    mean, rstd = total.mean(-1), total.var(-1).rsqrt()
    tickets = torch.zeros(TICKETS, dtype=torch.int32, device=DEVICE)
    arguments = (grad_out, *rest, total, weight, bias, mean, rstd, tickets, *needs, last, "triton")
    torch.library.opcheck(torch.ops.ceit.add_norm_backward.default, arguments)


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("prefix", [None, 2, -2])
def test_gradcheck(branch, prefix):
    tensors = make_tensors(torch.float64, branch)

    def call(*inputs):
        return add_layer_norm(*inputs, num_prefix_tokens=prefix)

    with use_backend("add_norm=triton"):
        assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    with use_backend("add_norm=reference"):
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("branch", [True, False])
def test_a_second_derivative_is_an_error_that_says_what_to_do(branch):
    tensors = make_tensors(branch=branch)
    with use_backend("add_norm=triton"):
        results = add_layer_norm(*tensors)
    (grad,) = torch.autograd.grad(loss_of(results), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"add_layer_norm is differentiable once.*reference"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks_and_keeps_values_and_gradients(dynamic):
    torch.manual_seed(0)
    module = Chain().to(DEVICE)
    x = torch.randn(SHAPE, device=DEVICE, requires_grad=True)
    leaves = [x, *module.parameters()]
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with use_backend("add_norm=triton"):
        eager, ours = module(x), compiled(x)
    eager_grads, grads = (torch.autograd.grad(loss_of(results), leaves) for results in (eager, ours))
    torch.testing.assert_close([*ours, *grads], [*eager, *eager_grads])


def test_exports_as_operators_that_run():
    module = Chain().to(DEVICE).eval().requires_grad_(False)
    x = torch.randn(SHAPE, device=DEVICE)
    with use_backend("add_norm=triton"):
        exported = torch.export.export(module, (x,))
        expected = module(x)
    assert str(exported.graph).count("ceit.add_norm") == 2
    torch.testing.assert_close(exported.module()(x), expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    module = Chain().to(DEVICE)
    x = torch.randn(SHAPE, device=DEVICE, requires_grad=True)
    grads = []
    for checkpointed in (False, True):
        with use_backend("add_norm=triton"):
            results = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
            grads.append(torch.autograd.grad(loss_of(results), [x, *module.parameters()]))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("hooked", [False, True])
def test_module_calls_a_norm_that_someone_watches_or_changed(hooked):
    class Changed(nn.LayerNorm):
        """A norm that computes something else."""

        def forward(self, x):
            seen.append(x)
            return 2 * super().forward(x)

    seen = []
    norm = (nn.LayerNorm(24) if hooked else Changed(24)).to(DEVICE)
    if hooked:
        norm.register_forward_hook(lambda *args: seen.append(args))
    x, branch = make_tensors()[:2]
    with use_backend("add_norm=triton"), pytest.raises(BackendError, match=r"norm has a hook|not Changed"):
        FusedAddNorm()(x, branch, norm)
    total, out = FusedAddNorm()(x, branch, norm)
    assert len(seen) == 1
    torch.testing.assert_close(total, x + branch)
    torch.testing.assert_close(out, norm(x + branch))


@pytest.mark.gpu
def test_is_captured_in_a_cuda_graph():
    module = Chain().cuda()
    x = torch.randn(SHAPE, device="cuda", requires_grad=True)
    expected = loss_of(module(x))
    results = torch.cuda.make_graphed_callables(module, (x,))(x)
    torch.testing.assert_close(loss_of(results), expected)
    loss_of(results).backward()
    assert torch.isfinite(x.grad).all()
