"""``ceit::leff_inference`` in PyTorch's machinery."""

import pytest
import torch
from support.where import DEVICE
from torch import nn

from ceit_kernels import FusedLeFF, use_backend
from ceit_kernels.leff.functional import pack
from ceit_kernels.leff.norms import of_module

pytestmark = pytest.mark.kernels(ttsem=False)


@pytest.fixture
def leff():
    torch.manual_seed(0)
    return FusedLeFF(16, 24).eval().requires_grad_(False).to(DEVICE)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 10, 16, device=DEVICE)


def parameters_of(leff):
    convolutions, norms = (leff.conv1, leff.conv2, leff.conv3), (leff.bn1, leff.bn2, leff.bn3)
    return pack([c.weight for c in convolutions], [c.bias for c in convolutions], [of_module(norm) for norm in norms])


@pytest.mark.parametrize("with_residual", [True, False])
def test_opcheck(leff, x, with_residual):
    residual = torch.randn_like(x) if with_residual else None
    arguments = (x, *parameters_of(leff), residual, [1e-5] * 3, 3, 3, 1, ["gelu", "gelu"], None, "triton")
    torch.library.opcheck(torch.ops.ceit.leff_inference.default, arguments)


def test_a_residual_is_added_to_every_token(leff, x):
    residual = torch.randn_like(x)
    settings = ([1e-5] * 3, 3, 3, 1, ["gelu", "gelu"], None, "triton")
    with_residual = torch.ops.ceit.leff_inference(x, *parameters_of(leff), residual, *settings)
    without = torch.ops.ceit.leff_inference(x, *parameters_of(leff), None, *settings)
    torch.testing.assert_close(with_residual, without + residual)


def test_the_first_activation_can_be_left_out(leff, x):
    leff.bn1, leff.bn2, leff.bn3 = nn.Identity(), nn.Identity(), nn.Identity()
    tokens = x[:, 1:]
    image = leff.conv1(tokens.mT.unflatten(2, (3, 3)))
    expected = leff.conv3(nn.functional.gelu(leff.conv2(image))).flatten(2).mT
    settings = ([1e-5] * 3, 3, 3, 0, ["identity", "gelu"], None, "triton")
    out = torch.ops.ceit.leff_inference(tokens.contiguous(), *parameters_of(leff), None, *settings)
    torch.testing.assert_close(out, expected)


def test_a_residual_that_needs_a_gradient_is_a_call_of_training(leff, x):
    out = leff(x, residual=torch.zeros_like(x).requires_grad_())
    out.sum().backward()


def test_a_gradient_through_the_operator_is_an_error(leff, x):
    settings = ([1e-5] * 3, 3, 3, 1, ["gelu", "gelu"], None, "triton")
    out = torch.ops.ceit.leff_inference(x.requires_grad_(), *parameters_of(leff), None, *settings)
    with pytest.raises(RuntimeError, match="ceit::leff_inference has no gradient"):
        out.sum().backward()


def test_compiles_without_graph_breaks(leff, x):
    compiled = torch.compile(leff, fullgraph=True, backend="aot_eager")
    with use_backend("leff=triton"), torch.no_grad():
        torch.testing.assert_close(compiled(x, (3, 3)), leff(x, (3, 3)), rtol=0, atol=0)


def test_exports_as_one_operator_that_runs(leff, x):
    with use_backend("leff=triton"), torch.no_grad():
        exported = torch.export.export(leff, (x,))
        expected = leff(x)
    assert "ceit.leff_inference" in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), expected)


def test_every_parameter_is_read_in_every_call(leff, x):
    with use_backend("leff=triton"):
        before = leff(x)
    for i, parameter in enumerate(parameters_of(leff)):
        parameter.data.mul_(2.0).add_(0.25)  # no version counter tells of this
        with use_backend("leff=triton"):
            after = leff(x)
        assert not torch.equal(after, before), i
        with use_backend("leff=reference"):
            torch.testing.assert_close(after, leff(x), rtol=1e-4, atol=1e-4)
        before = after


def test_a_compiled_module_sees_changed_weights(leff, x):
    compiled = torch.compile(leff, fullgraph=True, backend="aot_eager")
    with use_backend("leff=triton"), torch.no_grad():
        before = compiled(x, (3, 3))
        leff.conv2.weight.data.add_(1.0)
        after = compiled(x, (3, 3))
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, leff(x, (3, 3)), rtol=0, atol=0)


def test_weights_made_in_inference_mode_are_taken(x):
    with torch.inference_mode(), use_backend("leff=triton"):
        leff = FusedLeFF(16, 24).eval().to(DEVICE)
        fused = leff(x)
    with torch.inference_mode(), use_backend("leff=reference"):
        torch.testing.assert_close(fused, leff(x), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_a_captured_cuda_graph_reads_the_weights_of_its_replay(leff, x):
    with use_backend("leff=triton"), torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            leff(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = leff(x)
        x.mul_(2.0)
        leff.conv1.weight.mul_(2.0)
        leff.bn2.running_var.mul_(2.0)
        graph.replay()
        torch.testing.assert_close(out, leff(x))
