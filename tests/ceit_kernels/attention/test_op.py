"""``self_attention`` and its module without kernels: the reference, and the messages of bad input."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ceit_kernels import BackendError, FusedAttention, self_attention, use_backend


def make_qkv(dtype=torch.float32):
    return torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_the_reference_is_the_softmax_of_the_scores_over_the_values():
    qkv = make_qkv(torch.float64)
    q, k, v = qkv.unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    expected = ((q[:, :, :2] @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2).flatten(2)
    with use_backend("reference"):
        torch.testing.assert_close(self_attention(qkv, num_heads=2, scale=0.3, num_queries=2), expected)


BAD_ARGUMENTS = {
    "two dimensions": ({"qkv": torch.zeros(5, 48)}, ValueError, r"qkv: expected shape \(B, N, 3 \* H \* D\), got \(5"),
    "no token": ({"qkv": torch.zeros(3, 0, 48)}, ValueError, r"qkv: .*at least one token, got \(3, 0, 48\)"),
    "integers": ({"qkv": torch.zeros(3, 5, 48, dtype=torch.int32)}, TypeError, "qkv: expected a floating-point.*int32"),
    "heads": ({"num_heads": 5}, ValueError, "num_heads: expected a divisor of a third of 48 channels of qkv, got 5"),
    "no heads": ({"num_heads": 0}, ValueError, "num_heads: expected a divisor.*got 0"),
    "no channels": ({"qkv": torch.zeros(3, 5, 0)}, ValueError, "num_heads: expected a divisor of a third of 0"),
    "no query": ({"num_queries": 0}, ValueError, "num_queries: expected from 1 to the 5 tokens of qkv, got 0"),
    "many queries": ({"num_queries": 6}, ValueError, "num_queries: expected from 1 to the 5 tokens of qkv, got 6"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_what_was_given_and_expected(changes, error, message):
    arguments = {"qkv": make_qkv(), "num_heads": 2, "num_queries": 5} | changes
    with pytest.raises(error, match=message):
        self_attention(**arguments)
    qkv, num_heads, num_queries = arguments.values()
    with pytest.raises(error, match=message):
        torch.ops.ceit.attention(qkv, num_heads, 1.0, num_queries, False, "native")


BAD_GRADIENTS = {
    "shape": ({"grad_out": torch.zeros(3, 5, 48)}, ValueError, r"grad_out: expected shape \(3, num_queries, 16\), got"),
    "dtype": ({"grad_out": torch.zeros(3, 5, 16).double()}, TypeError, "grad_out: expected torch.float32 like qkv"),
    "device": ({"grad_out": torch.zeros(3, 5, 16, device="meta")}, ValueError, "grad_out: expected on cpu like qkv"),
    "statistics": (
        {"statistics": torch.zeros(0)},
        ValueError,
        r"statistics: expected shape \(3, 2, 5, 2\), got \(0,\)",
    ),
    "statistics dtype": (
        {"statistics": torch.zeros(3, 2, 5, 2).double()},
        TypeError,
        "statistics: expected torch.float32 like qkv",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_the_backward_operator_names_a_bad_argument(changes, error, message):
    tensors = {"grad_out": torch.zeros(3, 5, 16), "qkv": make_qkv(), "statistics": torch.ones(3, 2, 5, 2)} | changes
    with pytest.raises(error, match=message):
        torch.ops.ceit.attention_backward(*tensors.values(), 2, 1.0, "native")


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0])
def test_a_dropout_that_is_no_probability_is_refused(dropout_p):
    with pytest.raises(ValueError, match=rf"dropout_p: expected a probability in \[0, 1\), got {dropout_p}"):
        self_attention(make_qkv(), num_heads=2, dropout_p=dropout_p)


def test_the_operator_itself_refuses_a_backend_that_cannot_run():
    for backend, reason in (("triton", "the tensor is on the CPU"), ("reference", "it is plain PyTorch")):
        with pytest.raises(BackendError, match=f"ceit::attention: backend '{backend}' cannot run: {reason}"):
            torch.ops.ceit.attention(make_qkv(), 2, 1.0, 5, False, backend)


def test_a_dtype_that_the_kernels_lack_is_left_to_plain_pytorch_or_refused():
    qkv = make_qkv(torch.float16)
    assert self_attention(qkv, num_heads=2).dtype == torch.float16
    with use_backend("attention=native"), pytest.raises(BackendError, match=r"float32, bfloat16 and float64, not in"):
        self_attention(qkv, num_heads=2)


def test_the_reference_can_be_differentiated_twice():
    qkv = make_qkv(torch.float64).requires_grad_()
    with use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda qkv: self_attention(qkv, num_heads=2), qkv, fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
def test_the_module_drops_attention_weights_in_training_only_and_by_the_reference(training):
    module, x = FusedAttention(32, 2, attn_drop=0.5).train(training), torch.randn(3, 5, 32)
    assert torch.equal(module(x), module(x)) is not training
    if training:
        with use_backend("attention=native"), pytest.raises(BackendError, match="kernels have no attention dropout"):
            module(x)


def test_the_module_refuses_heads_that_do_not_divide_its_width():
    with pytest.raises(ValueError, match="num_heads: expected a divisor of dim=32, got 3"):
        FusedAttention(32, 3)


def test_the_module_takes_a_scale_and_says_so():
    module = FusedAttention(32, 2, qk_scale=0.5)
    assert module.scale == 0.5
    assert "num_heads=2, scale=0.5" in str(module)
    assert FusedAttention(32, 2).scale == 16**-0.5
