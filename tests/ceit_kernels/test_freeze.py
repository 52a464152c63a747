"""Snapshots of modules for inference."""

import contextlib
import copy
import io
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_as_accurate
from support.changes import VALUES, Inapplicable, Live
from support.fused_modules import MODULES, make_pair
from support.snapshots import X, make_leff, make_model, through_a_file
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from ceit_kernels import freeze, use_backend
from ceit_kernels.common.matmul import linear
from ceit_kernels.leff import FrozenLeFF, LocallyEnhancedFeedForward
from ceit_kernels.leff.cpu import kernels
from ceit_kernels.leff.module import fold_norms
from ceit_kernels.linear import FrozenLinear


@contextlib.contextmanager
def packed_calls():
    """Counts the calls of compiled code with what was packed for frozen modules."""
    calls = []

    def linear_of(x, weight, bias=None, packed=None):
        calls.extend(["linear"] * (packed is not None))
        return linear(x, weight, bias, packed)

    def leff_of(*arguments):
        calls.extend(["leff"] * (arguments[2] is not None))
        return infer(*arguments)

    infer = kernels._leff_infer
    with (
        mock.patch("ceit_kernels.linear.module.linear", linear_of),
        mock.patch.object(kernels, "_leff_infer", leff_of, create=True),
    ):
        yield calls


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("change", VALUES, ids=lambda change: change.__name__)
def test_no_change_of_the_module_reaches_the_snapshot(name, change):
    _, fused, x = make_pair(name, training=False)
    live = Live(fused, x, 0)
    frozen = freeze(live.model)
    expected = frozen(x)
    with contextlib.suppress(Inapplicable):
        change(live)
    assert torch.equal(frozen(x), expected)


@pytest.mark.parametrize("name", MODULES)
def test_agrees_to_rounding_in_float64(name):
    plain, fused, x = make_pair(name, training=False)
    for module in (plain, fused):
        with torch.no_grad():
            expected = module.double()(x.double())
        torch.testing.assert_close(freeze(module)(x.double()), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"with_bn": False}, {"kernel_size": 5, "bias": False}], ids=str)
def test_is_as_accurate_as_plain_pytorch(dtype, options):
    leff = make_leff(**options).to(dtype)
    x = torch.randn(8, 1 + 49, 32).to(dtype)
    with torch.no_grad(), use_backend("reference"):
        plain, exact = leff(x), copy.deepcopy(leff).double()(x.double())
    assert_as_accurate(["tokens"], [freeze(leff)(x)], [plain], [exact])


@pytest.mark.parametrize("layout", ["tokens", "NHWC", "NCHW"])
@pytest.mark.parametrize("residual", [False, True])
def test_blocks_take_every_layout_and_a_residual(layout, residual):
    shape = {"tokens": (2, 1 + 20, 32), "NHWC": (2, 4, 5, 32), "NCHW": (2, 32, 4, 5)}[layout]
    leff = make_leff(layout=layout, num_prefix_tokens=int(layout == "tokens")).double()
    x, added = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    options = {"grid_size": (4, 5), "residual": added if residual else None}
    with torch.no_grad(), packed_calls() as calls:
        expected = leff(x, **options)
        torch.testing.assert_close(freeze(leff)(x, **options), expected, rtol=1e-11, atol=1e-11)
    assert calls == ["leff"]


def test_plain_modules_are_fused_in_the_snapshot_alone():
    model = nn.Sequential(LocallyEnhancedFeedForward(32, 64), nn.Linear(32, 48))
    frozen = freeze(model)
    assert [type(module) for module in model] == [LocallyEnhancedFeedForward, nn.Linear]
    assert [type(module) for module in frozen.model] == [FrozenLeFF, FrozenLinear]
    assert model.training
    assert model[0].training
    with packed_calls() as calls:
        frozen(X)
    assert calls == ["leff", "linear"]


def test_has_no_parameters_and_gives_no_gradients():
    frozen = freeze(make_model().train())
    assert not any(module.training for module in frozen.modules())
    assert not list(frozen.parameters())
    assert not frozen(X).requires_grad
    with pytest.raises(RuntimeError, match=r"x: expected an input without gradient.*got requires_grad=True"):
        frozen(X.clone().requires_grad_())
    with torch.no_grad():
        frozen(X.clone().requires_grad_())


@pytest.mark.parametrize(
    ("attempt", "what"),
    [
        (lambda frozen: frozen.train(), "trained"),
        (lambda frozen: nn.Sequential(frozen).train(), "trained"),
        (lambda frozen: frozen.requires_grad_(), "trained"),
        (lambda frozen: frozen.to("cpu"), "moved or cast"),
        (lambda frozen: frozen.half(), "moved or cast"),
        (lambda frozen: nn.Sequential(frozen).double(), "moved or cast"),
        (lambda frozen: frozen.load_state_dict(frozen.state_dict()), "loaded into"),
        (lambda frozen: nn.Sequential(frozen).load_state_dict(nn.Sequential(frozen).state_dict()), "loaded into"),
    ],
    ids=["train", "train of parent", "requires_grad_", "to", "half", "cast of parent", "load", "load of parent"],
)
def test_what_would_change_it_is_refused(attempt, what):
    frozen = freeze(make_model())
    expected = frozen(X)
    with pytest.raises(RuntimeError, match=f"a frozen model cannot be {what}; do that to the model"):
        attempt(frozen)
    assert torch.equal(frozen(X), expected)


def test_what_changes_nothing_is_not_refused():
    frozen = freeze(make_model())
    assert frozen.eval() is frozen
    assert frozen.train(False) is frozen
    assert frozen.requires_grad_(False) is frozen
    outer = nn.Sequential(frozen).eval()
    assert torch.equal(outer(X), frozen(X))


@pytest.mark.parametrize("copied", [through_a_file, copy.deepcopy, copy.copy, freeze], ids=lambda f: f.__name__)
def test_copies_compute_the_same_with_what_was_packed(copied):
    frozen = freeze(make_model())
    other = copied(frozen)
    with packed_calls() as calls:
        assert torch.equal(other(X), frozen(X))
    assert calls == ["leff", "linear"] * 2


def test_a_file_is_not_larger_for_what_was_packed():
    sizes = []
    for module in (make_model(), freeze(make_model())):
        memory = io.BytesIO()
        torch.save(module, memory)
        sizes.append(memory.tell())
    assert sizes[1] < 1.3 * sizes[0]


def test_a_snapshot_that_is_loaded_elsewhere_runs_there():
    frozen = freeze(make_model())
    assert through_a_file(frozen, map_location="meta")(X.to("meta")).shape == (2, 17, 48)
    with use_backend("reference"):
        other = through_a_file(frozen)
    torch.testing.assert_close(other(X), frozen(X), rtol=1e-4, atol=1e-4)


class Opaque(torch.Tensor):
    """What its numbers stand for is its own business: here for twice as much."""

    def __deepcopy__(self, memo):
        return self.detach().clone()

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function not in (F.linear, F.conv2d) or not isinstance(arguments[1], Opaque):
            return super().__torch_function__(function, types, arguments, options)
        x, weight, *rest = arguments
        return function(x, 2 * weight.as_subclass(torch.Tensor), *rest, **(options or {}))


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1, 3, 5])
def test_a_subclass_of_tensors_in_a_layer_is_left_to_plain_pytorch(index):
    layers = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Linear(5, 48), nn.GELU(), nn.Linear(48, 48)
    model, x = nn.Sequential(*layers[:3], Tokens(), *layers[3:]).eval(), torch.randn(2, 3, 5, 5)
    layer = layers[index]
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Opaque))
    torch.testing.assert_close(freeze(model)(x), model(x))


class Tokens(nn.Module):
    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


def test_hooks_that_the_model_has_run_and_later_ones_do_not():
    model, calls = make_model(), []
    model[0].conv2.register_forward_hook(lambda *_: calls.append("had"))
    frozen = freeze(model)
    model[0].register_forward_hook(lambda *_: calls.append("later"))
    frozen(X)
    assert calls == ["had"]


@pytest.mark.parametrize("name", ["", "model", "model.0", "model.0.bn2", "model.1"])
def test_hooks_of_the_snapshot_run(name):
    frozen, calls = freeze(make_model()), []
    expected = frozen(X)
    handle = frozen.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(frozen(X), expected, rtol=1e-4, atol=1e-4)
    handle.remove()
    assert torch.equal(frozen(X), expected)
    assert len(calls) == 1


def test_global_hooks_see_every_module():
    frozen, seen = freeze(make_model()), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        frozen(X)
    finally:
        handle.remove()
    assert seen == set(frozen.modules())


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(32, 4), nn.Linear(4, 48)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def old_weight_norm(model):
    weight_norm(model[0].conv1)
    model(X)  # leaves a weight with a history


def pruned(model):
    prune.l1_unstructured(model[0].conv3, "weight", 0.5)
    model(X)


def with_lora(model):
    model[1] = Lora(model[1])


def with_another_activation(model):
    model[0].act = nn.Tanh()


def reparametrised(model):
    parametrizations.weight_norm(model[1])


def partly_trained(model):
    model[0].conv2.requires_grad_(False)


def with_recurrence(model):
    model[1] = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model.append(nn.LSTM(32, 8, batch_first=True))


@pytest.mark.parametrize(
    "change",
    [with_lora, reparametrised, old_weight_norm, pruned, partly_trained, with_another_activation, with_recurrence],
    ids=lambda change: change.__name__,
)
def test_freezes_whatever_is_in_a_model(change):
    model = make_model()
    change(model)
    model.eval()
    with torch.no_grad():
        expected = model(X)
    torch.testing.assert_close(freeze(model)(X), expected, rtol=1e-4, atol=1e-4)


def test_a_module_may_take_and_return_anything():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 48)

        def forward(self, parts, *, scale=1.0):
            return {"out": self.layer(parts[0]) * scale}

    odd = Odd().eval()
    with torch.no_grad():
        expected = odd([X], scale=2.0)["out"]
    torch.testing.assert_close(freeze(odd)([X], scale=2.0)["out"], expected)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_backend_that_is_set_counts(backend):
    frozen = freeze(make_model())
    with packed_calls() as calls, use_backend(backend):
        frozen(X)
    assert calls == (["leff", "linear"] if backend == "native" else [])


def test_other_modes_run_by_the_parts():
    model = make_model()
    frozen = freeze(model)
    with torch.no_grad(), packed_calls() as calls:
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert frozen(X).dtype == model(X).dtype
        torch.testing.assert_close(torch.func.vmap(frozen)(X[None])[0], model(X), rtol=1e-4, atol=1e-4)
        assert frozen(X[:0]).shape == (0, 17, 48)
    assert not calls
    with pytest.raises((TypeError, RuntimeError), match="float"):
        frozen(X.double())


def test_forward_mode_derivatives_are_the_models():
    model = make_model()
    found = torch.func.jvp(freeze(model), (X,), (torch.ones_like(X),))
    with use_backend("reference"):
        expected = torch.func.jvp(model, (X,), (torch.ones_like(X),))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_can_be_frozen_and_used_in_inference_mode():
    model = make_model()
    expected = freeze(model)(X)
    with torch.inference_mode():
        frozen = freeze(model)
        assert torch.equal(frozen(X), expected)
    for other in (frozen, copy.deepcopy(frozen)):
        assert torch.equal(other(X), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_folded_norms_compute_the_same(bias, affine):
    leff = make_leff(bias=bias).double()
    for norm in () if affine else (leff.bn1, leff.bn2, leff.bn3):
        norm.weight = norm.bias = None
    with torch.no_grad(), use_backend("reference"):
        expected = leff(X.double())
        fold_norms(leff)
        torch.testing.assert_close(leff(X.double()), expected, rtol=1e-11, atol=1e-11)
    assert not [module for module in leff.modules() if isinstance(module, nn.BatchNorm2d)]


def test_norms_are_folded_once_where_blocks_share_a_convolution():
    one, other = make_leff(0).double(), make_leff(1).double()
    other.conv2 = one.conv2
    x = X.double()
    with torch.no_grad(), use_backend("reference"):
        expected = [one(x), other(x)]
        for leff in (one, other):
            fold_norms(leff)
        torch.testing.assert_close([one(x), other(x)], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_a_snapshot_computes_what_the_model_did(cuda_graphs, dtype):
    model = make_model().to("cuda", dtype)
    frozen = freeze(model, cuda_graphs=cuda_graphs)
    draws = []
    for seed in range(3):
        x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
        with torch.no_grad():
            with use_backend("reference"):
                plain, exact = model(x), copy.deepcopy(model).double()(x.double())
            draws.append((frozen(x).clone(), plain, exact))
    assert len(frozen._graphs) == cuda_graphs
    for found, plain, exact in draws:
        assert_as_accurate(["out"], [found], [plain], [exact])
