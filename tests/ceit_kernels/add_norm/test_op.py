"""``add_layer_norm`` without kernels: the reference, and the messages of bad input."""

import pytest
import torch
from torch import nn

from ceit_kernels import BackendError, FusedAddNorm, add_layer_norm, backends, use_backend


def good_arguments():
    torch.manual_seed(0)
    return {
        "x": torch.randn(3, 5, 32),
        "branch": torch.randn(3, 5, 32),
        "weight": torch.randn(32),
        "bias": torch.randn(32),
        "num_prefix_tokens": 1,
    }


def test_the_reference_is_a_sum_and_its_layer_norm():
    arguments = good_arguments()
    total, out, prefix = add_layer_norm(**arguments, eps=1e-3)
    assert torch.equal(total, arguments["x"] + arguments["branch"])
    assert torch.equal(prefix, total[:, :1])
    expected = torch.nn.functional.layer_norm(total, (32,), arguments["weight"], arguments["bias"], 1e-3)
    torch.testing.assert_close(out, expected)
    assert len(add_layer_norm(arguments["x"])) == 2


BAD_ARGUMENTS = {
    "no dimension": ({"x": torch.zeros(())}, ValueError, r"x: expected shape \(..., C\) with at least one channel"),
    "no channel": ({"x": torch.zeros(3, 5, 0)}, ValueError, r"at least one channel, got \(3, 5, 0\)"),
    "integers": ({"x": torch.zeros(3, 5, 32, dtype=torch.int32)}, TypeError, "x: expected a floating-point.*int32"),
    "branch shape": ({"branch": torch.zeros(3, 1, 32)}, ValueError, r"branch: expected shape \(3, 5, 32\), got"),
    "branch dtype": ({"branch": torch.zeros(3, 5, 32, dtype=torch.int8)}, TypeError, "branch: expected a floating"),
    "branch device": (
        {"branch": torch.zeros(3, 5, 32, device="meta")},
        ValueError,
        "branch: expected on cpu like x, got meta",
    ),
    "weight shape": ({"weight": torch.zeros(31)}, ValueError, r"weight: expected shape \(32\), got \(31,\)"),
    "weight dtype": (
        {"weight": torch.zeros(32).half()},
        TypeError,
        r"weight: expected torch.float32 like x \+ branch, got torch.float16",
    ),
    "bias shape": ({"bias": torch.zeros(1, 32)}, ValueError, r"bias: expected shape \(32\), got"),
    "bias dtype": ({"bias": torch.zeros(32).double()}, TypeError, "bias: expected torch.float32 like x"),
    "too many prefix tokens": ({"num_prefix_tokens": 6}, ValueError, "num_prefix_tokens: expected at most the 5 tok"),
    "too many last tokens": ({"num_prefix_tokens": -6}, ValueError, "num_prefix_tokens: expected at most .* got -6"),
    "prefix of a row": (
        {"x": torch.zeros(32), "branch": None},
        ValueError,
        r"x: expected shape \(B, N, C\), got \(32,\)",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_what_was_given_and_expected(changes, error, message):
    arguments = good_arguments() | changes
    with pytest.raises(error, match=message):
        add_layer_norm(**arguments)
    tensors = [arguments[name] for name in ("x", "branch", "weight", "bias")]
    with pytest.raises(error, match=message):
        torch.ops.ceit.add_norm(*tensors, 1e-5, arguments["num_prefix_tokens"], True, None, "triton")


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_backward_has_no_gradient_of_a_parameter_that_is_not_there(missing):
    x, rows = torch.randn(2, 3, 8), torch.ones(2, 3)
    parameters = [None if name == missing else torch.ones(8) for name in ("weight", "bias")]
    tensors = x, None, None, x, *parameters, rows, rows, None
    with pytest.raises(ValueError, match=f"need_{missing}: expected False where {missing} is None, got True"):
        torch.ops.ceit.add_norm_backward(*tensors, True, True, True, False, "native")


def test_the_operator_itself_refuses_a_backend_that_cannot_run(monkeypatch):
    monkeypatch.setattr(backends, "has_kernel", lambda operator, device_type: False)
    tensors = list(good_arguments().values())[:4]
    for backend, reason in (
        ("triton", "the tensor is on the CPU"),
        ("native", "the compiled extension"),
        ("reference", "plain"),
    ):
        with pytest.raises(BackendError, match=f"ceit::add_norm: backend '{backend}' cannot run: .*{reason}"):
            torch.ops.ceit.add_norm(*tensors, 1e-5, 0, True, None, backend)


def test_rows_beyond_the_kernels_run_by_the_reference_or_say_why_not():
    x = torch.randn(2, 4097)
    assert add_layer_norm(x)[1].shape == (2, 4097)
    with use_backend("add_norm=triton"), pytest.raises(BackendError, match="4096 channels, x has 4097"):
        add_layer_norm(x)


def test_autocast_on_a_cpu_leaves_the_dtypes_alone():
    x, branch = torch.randn(3, 32).bfloat16(), torch.randn(3, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        total, out = add_layer_norm(x, branch, torch.ones(32), torch.zeros(32))
    assert total.dtype == out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "branch", [None, torch.randn(3, 32), torch.randn(3, 32).bfloat16()], ids=lambda b: str(type(b))
)
def test_autocast_reaches_a_direct_call_of_the_operator(branch):
    x, rest = torch.randn(3, 32), (torch.ones(32), torch.zeros(32), 1e-6, 0, False, None, "native")
    expected = torch.ops.ceit.add_norm(x, branch, *rest)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.ops.ceit.add_norm(x, branch, *rest)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm", [nn.LayerNorm(32), nn.LayerNorm((5, 32)), nn.BatchNorm1d(5), nn.Identity()], ids=str)
def test_module_takes_any_norm(norm):
    arguments = good_arguments()
    total, out, prefix = FusedAddNorm()(arguments["x"], arguments["branch"], norm, 2)
    assert torch.equal(total, arguments["x"] + arguments["branch"])
    assert torch.equal(prefix, total[:, :2])
    torch.testing.assert_close(out, norm(total))
