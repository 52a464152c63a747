"""Fused modules under what looks at a model from outside: transforms, tracers, exporters, subclasses of tensors."""

import copy

import pytest
import torch
from support.fused_modules import MODULES, assert_same, every_module, make_pair, native, step
from torch import fx, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ceit_kernels import BackendError, lca_attention, leff_block, self_attention, use_backend
from ceit_kernels.leff import LocallyEnhancedFeedForward

scriptable = pytest.mark.parametrize("name", [name for name in MODULES if name != "add_norm"])


class Tagged(torch.Tensor):
    """A subclass that counts the functions that see it."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs)


@every_module
def test_forward_mode_gives_the_plain_derivative(name):
    plain, fused, x = make_pair(name, training=False)
    tangent = torch.randn_like(x)
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other attentions have no derivative in forward mode
        assert_same(jvp(fused, (x,), (tangent,)), jvp(plain, (x,), (tangent,)))


@every_module
def test_dual_numbers_carry_the_plain_derivative_in_training(name):
    *modules, x = make_pair(name)
    tangent, results = torch.randn_like(x), []
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        for module in modules:
            results.append(forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent))))
        assert_same(*results)


@every_module
def test_gradients_of_every_sample_are_those_of_the_plain_module(name):
    plain, fused, x = make_pair(name, training=False)
    parameters = {key: tensor.detach() for key, tensor in plain.named_parameters()}

    def gradients(module):
        def loss(values, sample):
            return functional_call(module, values, (sample[None],)).square().sum()

        return vmap(grad(loss), (None, 0))(parameters, x)

    found, expected = gradients(fused), gradients(plain)
    assert_same([found[key] for key in parameters], [expected[key] for key in parameters], 1e-3, 1e-3)


def test_jacobians_are_those_of_the_plain_module():
    plain, fused, x = make_pair("leff without norms", training=False)
    torch.testing.assert_close(jacrev(fused)(x[:1]), jacrev(plain)(x[:1]), rtol=1e-3, atol=1e-4)
    assert_same(vjp(fused, x)[1](x), vjp(plain, x)[1](x), 1e-3, 1e-3)


@every_module
def test_a_batch_of_gradients_gives_what_they_give_one_by_one(name):
    _, fused, x = make_pair(name)
    leaves = [x.requires_grad_(), *fused.parameters()]
    with native():
        out = fused(x)
    grads = torch.randn(3, *out.shape)
    keep = {"retain_graph": True, "allow_unused": True}
    at_once = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, **keep)
    mapped = vmap(lambda g: torch.autograd.grad(out, leaves, g, **keep))(grads)
    for i in range(3):
        expected = torch.autograd.grad(out, leaves, grads[i], **keep)
        assert_same([g[i] for g in at_once], expected)
        assert_same([g[i] for g in mapped], expected)


@scriptable
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_torchscript_compiles_the_module_and_leaves_it_as_it_is(name, kind):
    plain, fused, x = make_pair(name, training=False)
    module = plain if kind == "plain" else fused
    classes = [type(child) for child in module.modules()]
    scripted = torch.jit.script(module)
    assert [type(child) for child in module.modules()] == classes
    torch.testing.assert_close(scripted(x), plain(x), rtol=1e-4, atol=1e-4)
    assert_same(step(torch.jit.script(module.train()), x), step(plain.train(), x))


@every_module
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_has_no_operators_of_this_package(name):
    plain, fused, x = make_pair(name, training=False)
    traced = torch.jit.trace(fused, (x,))
    assert "ceit::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), plain(x), rtol=1e-4, atol=1e-4)


@every_module
def test_symbolic_tracing_goes_inside_or_takes_the_module_whole(name):
    plain, fused, x = make_pair(name, training=False)

    class Whole(fx.Tracer):
        def is_leaf_module(self, module, qualified_name):
            return module is fused

    model = nn.Sequential(fused)
    whole = fx.GraphModule(model, Whole().trace(model))
    inside = fx.symbolic_trace(fused, {"grid_size": None, "residual": None} if name.startswith("leff") else None)
    for graph in (whole, inside):
        torch.testing.assert_close(graph(x), plain(x), rtol=1e-4, atol=1e-4)


@every_module
def test_a_subclass_of_tensors_reaches_plain_pytorch(name):
    plain, fused, x = make_pair(name, training=False)
    Tagged.calls = 0
    out = fused(x.as_subclass(Tagged))
    assert type(out) is Tagged
    assert Tagged.calls > 0
    torch.testing.assert_close(out.as_subclass(torch.Tensor), plain(x))
    if next(fused.parameters()).dim() == 1:
        return
    for module in fused.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[key] = parameter.as_subclass(Tagged)
    assert type(fused(x)) is Tagged


@every_module
def test_the_meta_device_gives_shapes(name):
    plain, fused, x = make_pair(name, training=False)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            out = copy.deepcopy(fused).to("meta")(x.to("meta"))
        assert out.is_meta
        assert out.shape == plain(x).shape


@every_module
def test_compiles_with_sizes_that_change(name):
    plain, fused, x = make_pair(name, training=True)
    torch._dynamo.reset()
    compiled = torch.compile(fused, dynamic=True, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        inputs = torch.randn(batch, *x.shape[1:])
        assert_same(step(compiled, inputs), step(plain, inputs))


@every_module
def test_exports_for_batches_of_any_size(name):
    plain, fused, x = make_pair(name, training=False)
    with torch.no_grad(), native():
        program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("b")},))
    assert any("ceit." in str(node.target) for node in program.graph.nodes) or name == "lca"
    other = torch.randn(5, *x.shape[1:])
    torch.testing.assert_close(program.module()(other), plain(other), rtol=1e-4, atol=1e-4)


def test_a_hook_that_is_added_to_a_compiled_module_is_called():
    _, fused, x = make_pair("leff", training=False)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager")
    before, calls = compiled(x), []
    fused.conv1.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(compiled(x), before, rtol=1e-4, atol=1e-4)
    assert calls


@pytest.mark.parametrize("name", ["attention", "linear", "lca"])  # of convolutions PyTorch 2.14 compiles no second one
def test_transforms_that_are_compiled_give_what_those_of_the_plain_module_do(name):
    plain, fused, x = make_pair(name, training=False)
    tangent, batches = torch.randn_like(x), torch.stack((x, 2 * x))

    def transformed(module):
        return lambda x: (*jvp(module, (x,), (tangent,)), vmap(module)(batches))

    torch._dynamo.reset()
    with sdpa_kernel(SDPBackend.MATH):
        assert_same(torch.compile(transformed(fused), backend="aot_eager")(x), transformed(plain)(x))


@every_module
def test_inference_mode_records_no_gradients_where_they_are_enabled(name):
    plain, fused, x = make_pair(name)
    with torch.inference_mode(), torch.enable_grad():
        out = fused(x)
        assert_same([out], [plain(x)])
    assert not out.requires_grad


def test_functions_leave_transforms_to_plain_pytorch_or_say_why_not():
    x, qkv = torch.randn(2, 4, 8), torch.randn(2, 4, 24)
    weights = [torch.randn(8, 8, 1, 1), torch.randn(8, 1, 3, 3), torch.randn(8, 8, 1, 1)]
    calls = {
        "leff": (lambda t: leff_block(t, weights), x),
        "lca": (lambda t: lca_attention(t, torch.ones(24, 8), num_heads=2), x),
        "attention": (lambda t: self_attention(t, num_heads=2), qkv),
    }
    for operator, (function, argument) in calls.items():
        with sdpa_kernel(SDPBackend.MATH):
            assert jvp(function, (argument,), (torch.randn_like(argument),))[1].abs().max() > 0
        with use_backend(f"{operator}=native"), pytest.raises(BackendError, match=r"a transform of torch\.func"):
            jvp(function, (argument,), (argument,))


def test_dispatch_modes_see_the_operators():
    _, fused, x = make_pair("leff", training=False)
    seen = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), native(), Watching():
        fused(x)
    assert "ceit.leff_inference.default" in seen


@pytest.mark.parametrize("kind", ["plain", "fused"])
@pytest.mark.parametrize(
    ("grid", "error"),
    [((-2, -2), ValueError), ((-1, -4), ValueError), ((4,), ValueError), ((2, 2, 1), ValueError), (4, TypeError),
     ((2.0, 2.0), TypeError), (("2", "2"), TypeError)],
)  # fmt: skip
def test_a_grid_is_two_positive_integers(grid, error, kind):
    plain, fused, _ = make_pair("leff")
    with pytest.raises(error, match="grid_size: expected two positive integers, got"):
        (plain if kind == "plain" else fused)(torch.randn(1, 5, 32), grid)


def test_a_square_grid_is_found_for_every_square():
    leff = LocallyEnhancedFeedForward(1, with_bn=False)
    for side in (1, 2, 3, 14, 97):
        assert leff(torch.randn(1, 1 + side * side, 1)).shape[1] == 1 + side * side
    with pytest.raises(ValueError, match="a square number of patch tokens"):
        leff(torch.randn(1, 1 + 97 * 97 - 1, 1))
