"""``ceit::leff_inference`` in PyTorch's machinery, and the folding of its weights."""

import pytest
import torch
from support.where import DEVICE
from torch import nn

from ceit_kernels import FusedLeFF, use_backend
from ceit_kernels.leff import folding
from ceit_kernels.leff.folding import fold
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


@pytest.fixture
def folds(monkeypatch):
    """A list that grows whenever weights are folded anew."""
    calls, compute = [], folding._fold
    monkeypatch.setattr(folding, "_fold", lambda *args: calls.append(1) or compute(*args))
    return calls


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


def test_weights_are_folded_once_per_version(leff, x, folds):
    with use_backend("leff=triton"), torch.no_grad():
        before = leff(x)
        leff(x)
        assert len(folds) == 1
        for tensor in (leff.conv1.weight, leff.bn2.running_var, leff.conv3.bias):
            tensor.mul_(2.0)
            folds.clear()
            after = leff(x)
            assert len(folds) == 1
            assert not torch.equal(after, before)
            before = after
            with use_backend("leff=reference"):
                torch.testing.assert_close(after, leff(x), rtol=1e-4, atol=1e-4)


def test_a_compiled_module_sees_changed_weights(leff, x, folds):
    compiled = torch.compile(leff, fullgraph=True, backend="aot_eager")
    with use_backend("leff=triton"), torch.no_grad():
        compiled(x, (3, 3))
        compiled(x, (3, 3))
        assert len(folds) == 1
        leff.conv2.weight.add_(1.0)
        torch.testing.assert_close(compiled(x, (3, 3)), leff(x, (3, 3)), rtol=0, atol=0)


def test_switching_modes_forgets_what_was_folded(leff, x, folds):
    with use_backend("leff=triton"), torch.no_grad():
        leff(x)
        leff.conv1.weight.data.mul_(2.0)  # no version counter tells of this
        leff.train().eval()
        changed = leff(x)
        assert len(folds) == 2
    with use_backend("leff=reference"), torch.no_grad():
        torch.testing.assert_close(changed, leff(x), rtol=1e-4, atol=1e-4)


def test_folded_weights_go_with_their_module(x):
    leff = FusedLeFF(16, 24).eval().requires_grad_(False).to(DEVICE)
    entries = len(folding._cache)
    with use_backend("leff=triton"):
        leff(x)
    assert len(folding._cache) == entries + 1
    del leff
    assert len(folding._cache) == entries


def test_weights_made_in_inference_mode_are_folded_every_time(x, folds):
    with torch.inference_mode(), use_backend("leff=triton"):
        leff = FusedLeFF(16, 24).eval().to(DEVICE)
        leff(x)
        leff(x)
    assert len(folds) == 2


def test_folding_is_the_convolution_followed_by_its_norm():
    torch.manual_seed(0)
    leff = FusedLeFF(6, 5, kernel_size=3).double()
    leff(torch.randn(4, 10, 6, dtype=torch.float64) * 3 + 1)
    leff.eval().requires_grad_(False)
    folded = fold(parameters_of(leff), [1e-5] * 3, torch.float64)
    image = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    functional = nn.functional
    first = functional.conv2d(image, folded.weight1[:, :, None, None], folded.bias1)
    torch.testing.assert_close(first, leff.bn1(leff.conv1(image)))
    taps = folded.taps.t().reshape(5, 1, 3, 3)
    second = functional.conv2d(first, taps, folded.bias2, padding=1, groups=5)
    torch.testing.assert_close(second, leff.bn2(leff.conv2(first)))
    third = functional.conv2d(second, folded.weight3[:, :, None, None], folded.bias3)
    torch.testing.assert_close(third, leff.bn3(leff.conv3(second)))


@pytest.mark.gpu
def test_is_captured_in_a_cuda_graph_and_folds_anew_afterwards(leff, x, folds):
    with use_backend("leff=triton"), torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            leff(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = leff(x)
        x.mul_(2.0)
        graph.replay()
        torch.testing.assert_close(out, leff(x))
