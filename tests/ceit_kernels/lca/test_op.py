"""``lca_attention`` without kernels: the reference, and the messages of bad input."""

import pytest
import torch

from ceit_kernels import BackendError, FusedLCAAttention, lca_attention, use_backend

HEADS = 2


def good_arguments():
    torch.manual_seed(0)
    return {
        "x": torch.randn(3, 5, 32),
        "qkv_weight": torch.randn(96, 32),
        "qkv_bias": torch.randn(96),
        "num_heads": HEADS,
    }


def test_the_reference_is_attention_of_the_last_token():
    arguments = good_arguments()
    x, weight, bias = arguments["x"], arguments["qkv_weight"], arguments["qkv_bias"]
    q, k, v = (x @ weight.T + bias).unflatten(-1, (3, HEADS, 16)).permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, -1:], k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(lca_attention(**arguments), expected)


BAD_ARGUMENTS = {
    "two dimensions": ({"x": torch.zeros(5, 32)}, ValueError, r"x: expected shape \(B, L, C\), got \(5, 32\)"),
    "no layer": ({"x": torch.zeros(3, 0, 32)}, ValueError, r"at least one layer and channel, got \(3, 0, 32\)"),
    "integers": ({"x": torch.zeros(3, 5, 32, dtype=torch.int32)}, TypeError, "x: expected a floating-point.*int32"),
    "heads": ({"num_heads": 3}, ValueError, "num_heads: expected a divisor of the 32 channels of x, got 3"),
    "no heads": ({"num_heads": 0}, ValueError, "num_heads: expected a divisor.*got 0"),
    "weight shape": ({"qkv_weight": torch.zeros(32, 96)}, ValueError, r"qkv_weight: expected shape \(96, 32\), got"),
    "bias shape": ({"qkv_bias": torch.zeros(32)}, ValueError, r"qkv_bias: expected shape \(96\), got \(32,\)"),
    "weight dtype": (
        {"qkv_weight": torch.zeros(96, 32).half()},
        TypeError,
        "qkv_weight: expected torch.float32 like x",
    ),
    "bias dtype": ({"qkv_bias": torch.zeros(96).double()}, TypeError, "qkv_bias: expected torch.float32 like x"),
    "weight device": (
        {"qkv_weight": torch.zeros(96, 32, device="meta")},
        ValueError,
        "qkv_weight: expected on cpu like x, got meta",
    ),
    "dropout of all": ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
    "negative dropout": ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a probability"),
    "seed shape": ({"dropout_p": 0.1, "seed": torch.tensor(1)}, ValueError, r"seed: expected shape \(1\), got \(\)"),
    "seed dtype": ({"dropout_p": 0.1, "seed": torch.tensor([1.0])}, TypeError, "seed: expected torch.int64"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_what_was_given_and_expected(changes, error, message):
    arguments = good_arguments() | changes
    with pytest.raises(error, match=message):
        lca_attention(**arguments)
    x, weight, bias = (arguments[name] for name in ("x", "qkv_weight", "qkv_bias"))
    settings = (arguments["num_heads"], 1.0, arguments.get("dropout_p", 0.0), False, None, "triton")
    with pytest.raises(error, match=message):
        torch.ops.ceit.lca(x, weight, bias, arguments.get("seed"), *settings)


def test_the_operator_itself_needs_a_seed_to_drop_anything():
    x, weight, bias = (good_arguments()[name] for name in ("x", "qkv_weight", "qkv_bias"))
    torch.ops.ceit.lca(x, weight, bias, None, HEADS, 1.0, 0.0, False, None, "native")
    with pytest.raises(ValueError, match=r"seed: expected an int64 tensor.*with dropout_p > 0, got None"):
        torch.ops.ceit.lca(x, weight, bias, None, HEADS, 1.0, 0.1, False, None, "native")


def test_the_operator_itself_refuses_a_backend_that_cannot_run():
    x, weight, bias = (good_arguments()[name] for name in ("x", "qkv_weight", "qkv_bias"))
    for backend, reason in (("triton", "the tensor is on the CPU"), ("reference", "plain")):
        with pytest.raises(BackendError, match=f"ceit::lca: backend '{backend}' cannot run: .*{reason}"):
            torch.ops.ceit.lca(x, weight, bias, None, HEADS, 1.0, 0.0, False, None, backend)


@pytest.mark.parametrize(
    ("shape", "heads", "limit"), [((1, 129, 32), 2, "128 layers"), ((1, 3, 514), 2, "256 channels")]
)
def test_sizes_beyond_the_kernels_run_by_the_reference_or_say_why_not(shape, heads, limit):
    x, weight = torch.randn(shape), torch.randn(3 * shape[-1], shape[-1])
    assert lca_attention(x, weight, num_heads=heads).shape == (1, 1, shape[-1])
    with use_backend("lca=triton"), pytest.raises(BackendError, match=limit):
        lca_attention(x, weight, num_heads=heads)


def test_the_reference_can_be_differentiated_twice():
    arguments = good_arguments()
    arguments["x"].requires_grad_()
    with use_backend("lca=reference"):
        out = lca_attention(**arguments)
    (grad,) = torch.autograd.grad(out.square().sum(), arguments["x"], create_graph=True)
    grad.square().sum().backward()
    assert arguments["x"].grad.abs().sum() > 0


@pytest.mark.parametrize("kept", [True, False])
def test_module_drops_attention_weights_in_training_only(kept):
    torch.manual_seed(0)
    module = FusedLCAAttention(32, HEADS, attn_drop=0.5).train(not kept)
    x = torch.randn(3, 5, 32)
    assert torch.equal(module(x), module(x)) is kept


def test_module_refuses_heads_that_do_not_divide_its_width():
    with pytest.raises(ValueError, match="num_heads: expected a divisor of dim=32, got 3"):
        FusedLCAAttention(32, 3)


def test_module_takes_a_scale():
    torch.manual_seed(0)
    module = FusedLCAAttention(32, HEADS, qk_scale=0.5)
    assert module.scale == 0.5
    assert FusedLCAAttention(32, HEADS).scale == 16**-0.5
