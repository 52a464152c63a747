"""Matrix products on the CPU by this project's GEMM."""

import pytest
import torch
from support.accuracy import assert_as_accurate, assert_as_accurate_over_draws

from ceit_kernels.common import matmul
from ceit_kernels.common.extension import has_kernel
from ceit_kernels.leff.activations import ACTIVATIONS, INDICES

assert has_kernel("_linear", "cpu")  # loads the extension
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
SIZES = pytest.mark.parametrize(
    ("rows", "columns", "terms"),
    [(48, 64, 16), (197, 100, 33), (53, 7, 1), (300, 129, 515), (1000, 31, 256), (64, 192, 769)],
)


@DTYPES
@SIZES
@pytest.mark.parametrize("threads", [1, 2])
def test_a_linear_layer_is_as_accurate_as_pytorchs_prepacked_or_not(dtype, rows, columns, terms, threads):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, terms), torch.randn(columns, terms), torch.randn(columns)
    x, weight, bias = (tensor.to(dtype) for tensor in (x, weight, bias))
    expected = torch.nn.functional.linear(x, weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = matmul.linear(x, weight, bias)
        prepacked = matmul.linear(x, weight, bias, matmul.prepack_linear(weight, bias))
    finally:
        torch.set_num_threads(before)
    if dtype == torch.float64:
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    else:
        assert_as_accurate(["y"], [found], [expected], [exact])
    assert torch.equal(prepacked, found)


@DTYPES
@pytest.mark.parametrize(("columns", "terms"), [(64, 16), (100, 1), (7, 190), (129, 515), (1000, 1283)])
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_one_row_is_as_accurate_as_pytorchs(dtype, columns, terms, activation):
    def results(draw):
        torch.manual_seed(draw)
        x, weight, bias = (torch.randn(size).to(dtype) for size in ((1, terms), (columns, terms), (columns,)))
        function = ACTIVATIONS[activation]
        packed = matmul.prepack_linear(weight, bias)
        found = torch.ops.ceit._linear(x, weight, bias, packed, columns, INDICES[activation])
        exact = function(torch.nn.functional.linear(x.double(), weight.double(), bias.double()))
        return [found], [function(torch.nn.functional.linear(x, weight, bias))], [exact]

    if dtype == torch.float64:
        (found,), _, (exact,) = results(0)
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    else:
        assert_as_accurate_over_draws(["y"], map(results, range(12)))


def test_the_index_of_no_activation():
    assert INDICES["identity"] == matmul.IDENTITY


@SIZES
@pytest.mark.parametrize(
    ("dtype", "has_bfloat16"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
    ids=["float32", "bfloat16-onednn", "bfloat16"],
)
def test_products_of_backward_are_as_accurate_as_pytorchs(dtype, has_bfloat16, rows, columns, terms, monkeypatch):
    monkeypatch.setattr(matmul, "_has_bfloat16", lambda: has_bfloat16)
    torch.manual_seed(0)
    a, b, x = torch.randn(rows, terms), torch.randn(terms, columns), torch.randn(rows, columns)
    a, b, x = (tensor.to(dtype) for tensor in (a, b, x))
    found = [matmul.matmul(a, b), matmul.weight_gradient(a, x).to(dtype)]
    exact = [a.double() @ b.double(), a.double().t() @ x.double()]
    assert_as_accurate(["product", "gradient"], found, [a @ b, a.t() @ x], exact)


def test_what_was_prepacked_belongs_to_no_one_else():
    weight, bias, x = torch.randn(96, 40), torch.randn(96), torch.randn(60, 40)
    packed = matmul.prepack_linear(weight, bias)
    before = matmul.linear(x, weight, bias, packed)
    weight.zero_(), bias.zero_()
    assert torch.equal(matmul.linear(x, weight, bias, packed), before)


def test_a_packed_weight_of_another_layer_is_an_error():
    weight, other = torch.randn(96, 40), torch.randn(32, 40)
    with pytest.raises(RuntimeError, match="packed: expected"):
        matmul.linear(torch.randn(60, 40), weight, None, matmul.prepack_linear(other, None))
