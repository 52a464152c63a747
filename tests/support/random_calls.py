"""Calls of fused modules and of models, drawn by hypothesis: sizes, dtypes, views, modes, means, threads."""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ceit import CeiT
from ceit_kernels import freeze, fuse, use_backend
from ceit_kernels.add_norm import AddNorm
from ceit_kernels.attention import Attention
from ceit_kernels.i2t import Image2Tokens
from ceit_kernels.lca import LCAAttention
from ceit_kernels.leff import LocallyEnhancedFeedForward
from ceit_kernels.linear import PatchProjection

from .accuracy import assert_as_accurate_over_draws

# Many, for the errors of a result of one number are equally good or bad by luck: of 12 draws one call in ten would seem
# twice as wrong. Most calls are clear after one.
DRAWS = 96
# In float64, of the largest value: batch statistics of a few values magnify any rounding.
TOLERANCE = 1e-8


class LeFF(nn.Module):
    """A block on its grid, with or without a residual."""

    def __init__(self, grid, **options):
        super().__init__()
        self.block, self.grid = LocallyEnhancedFeedForward(**options), grid

    def forward(self, x, residual=None):
        return self.block(x, self.grid, residual)


class Normed(nn.Module):
    """A residual connection and its norm."""

    def __init__(self, channels, affine, prefix):
        super().__init__()
        self.norm, self.add_norm = nn.LayerNorm(channels, 1e-6, affine), AddNorm()
        self.prefix = prefix

    def forward(self, x, branch=None):
        return self.add_norm(x, branch, self.norm, self.prefix)


class FirstQueries(nn.Module):
    """Attention of which the first tokens ask."""

    def __init__(self, queries, **options):
        super().__init__()
        self.attention, self.queries = Attention(**options), queries

    def forward(self, x):
        return self.attention(x, self.queries)


@dataclass(frozen=True)
class Call:
    """What is called, and how.

    Attributes:
        module: the plain class.
        options: of its constructor.
        shapes: of the inputs.
        dtype: of inputs and parameters; autocast computes in bfloat16.
        mode: "train", "eval", both with gradients, "inference" without, or "frozen", a snapshot.
        norms: "b" for batch statistics or "f" for frozen ones, in "train", by turns; their dtype if another.
        view: how the inputs lie in memory.
        mean: of the inputs and ``bias`` of the parameters that are biases.
        size: standard deviation of the inputs.
    """

    module: Callable[..., nn.Module]
    options: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    autocast: bool = False
    mode: str = "train"
    norms: str = "b"
    wide_norms: bool = False
    momentum: float | None = 0.1
    view: str = "contiguous"
    mean: float = 0.0
    bias: float = 0.0
    size: float = 1.0
    expanded_gradient: bool = False
    threads: int = 1

    def make(self, draw: int) -> tuple[nn.Module, list[Tensor]]:
        """The plain module and its inputs, without their view."""
        torch.manual_seed(draw)
        module = self.module(**self.options)
        norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
        biased = any("conv" in name and name.endswith("bias") for name, _ in module.named_parameters())
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_().add_(self.bias)
            for norm in norms:
                norm.weight.normal_()
                norm.running_mean.normal_().add_(self.bias if biased else 0.0)  # as the numbers that it is of
                norm.running_var.uniform_(0.5, 2.0)
                norm.momentum = self.momentum
        module.to(self.dtype).train(self.mode == "train")
        for norm, mode in zip(norms, self.norms * len(norms), strict=False):
            norm.train(norm.training and mode == "b")
            if self.wide_norms:
                norm.float()
        inputs = [torch.randn(shape, dtype=torch.float64) * self.size + self.mean for shape in self.shapes]
        return module, [x.to(self.dtype) for x in inputs]

    def results(
        self, module: nn.Module, inputs: list[Tensor], backend: str, draw: int, wide: bool
    ) -> dict[str, Tensor]:
        """By name, the outputs, the gradients of inputs and parameters, and the buffers afterwards."""
        context = torch.autocast("cpu", torch.bfloat16) if self.autocast and not wide else contextlib.nullcontext()
        gradients = self.mode in ("train", "eval")
        leaves = [view_of(x, self.view) for x in inputs]
        named = {name: p for name, p in module.named_parameters() if gradients}
        if gradients:
            leaves = [leaf.requires_grad_() for leaf in leaves]
            named |= {f"input {i}": leaf for i, leaf in enumerate(leaves)}
        with use_backend(backend), context, torch.set_grad_enabled(gradients):
            out = module(*leaves)
        outs = [out] if isinstance(out, Tensor) else list(out)
        found = {f"output {i}": out.detach() for i, out in enumerate(outs)}
        if gradients:
            torch.manual_seed(1000 + draw)
            ways = [torch.randn(out.shape, dtype=torch.float64) for out in outs]
            if self.expanded_gradient:
                ways = [way.mean().expand(way.shape) for way in ways]
            ways = [way.to(self.dtype).to(out.dtype) for way, out in zip(ways, outs, strict=True)]
            got = torch.autograd.grad(outs, list(named.values()), ways, materialize_grads=True)
            found |= {f"{name}.grad": grad for name, grad in zip(named, got, strict=True)}
        return found | {name: buffer.clone() for name, buffer in module.named_buffers() if self.mode == "train"}

    def compare(self, draw: int) -> tuple[dict[str, Tensor], ...]:
        """Results: fused, plain and exact."""
        plain, inputs = self.make(draw)
        exact = copy.deepcopy(plain).double()
        fused = freeze(plain) if self.mode == "frozen" else fuse(copy.deepcopy(plain))
        served = "native" if self.dtype != torch.float16 else "auto"
        return (
            self.results(fused, inputs, served, draw, False),
            self.results(plain, inputs, "reference", draw, False),
            self.results(exact, [x.double() for x in inputs], "reference", draw, True),
        )

    def check(self) -> None:
        """The error rule over draws; in float64 agreement to rounding; nothing where plain PyTorch overflows."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            first = self.compare(0)
            assert list(first[0]) == list(first[1]) == list(first[2])
            if not all(torch.isfinite(value).all() for value in first[1].values()):
                return
            if self.dtype == torch.float64:
                assert_to_rounding(*first)
                return
            draws = (self.compare(draw) if draw else first for draw in range(DRAWS))
            names = [name for name in first[0] if has_a_right_digit(first[1][name], first[2][name])]
            results = ([[r[n] for n in names] for r in draw] for draw in draws)
            assert_as_accurate_over_draws(names, results, fewest=1, with_jumps=True)
        finally:
            torch.set_num_threads(before)


def has_a_right_digit(plain: Tensor, exact: Tensor) -> bool:
    """Whether there is something to be as right as: not of sums that cancel to zero but for rounding."""
    if not plain.is_floating_point() or plain.numel() == 0:
        return False
    return bool((plain.double() - exact).abs().max() < exact.abs().max())


def view_of(x: Tensor, view: str) -> Tensor:
    """The values of x, or its first image's, in memory of another layout."""
    if view == "expanded":
        return x[:1].clone().expand_as(x).detach()
    if view == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if view == "strided":
        return torch.stack((x, x), -1)[..., 0]
    if view == "offset":
        return torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)
    if view == "channels last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.clone(memory_format=torch.contiguous_format)


def assert_to_rounding(fused, plain, exact):
    for name, expected in plain.items():
        largest = expected.abs().max().item() if expected.numel() else 0.0
        atol = TOLERANCE * max(1.0, largest)
        torch.testing.assert_close(fused[name], expected, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def few(most):
    """Sizes, of which one is the most telling."""
    return st.one_of(st.just(1), st.integers(1, most))


_flag = st.booleans()


@st.composite
def leff(draw):
    prefix, grid = draw(st.integers(0, 2)), (draw(few(9)), draw(few(9)))
    channels, hidden, batch = draw(few(40)), draw(few(150)), draw(few(4))
    out = channels if prefix else draw(st.sampled_from([channels, draw(few(40))]))
    options = {
        "grid": grid, "in_features": channels, "hidden_features": hidden, "out_features": out,
        "kernel_size": draw(st.sampled_from([3, 5, 7])), "with_bn": draw(_flag), "num_prefix_tokens": prefix,
        "bias": draw(_flag), "first_act": draw(_flag), "act_layer": draw(st.sampled_from([nn.GELU, nn.SiLU, nn.ReLU])),
    }  # fmt: skip
    tokens = prefix + grid[0] * grid[1]
    residual = [(batch, tokens, out)] if draw(_flag) else []
    return LeFF, options, [(batch, tokens, channels), *residual], batch * grid[0] * grid[1]


@st.composite
def lca(draw):
    heads, channels, layers = draw(few(4)), draw(few(40)), draw(few(40))
    options = {"dim": heads * channels, "num_heads": heads, "qkv_bias": draw(_flag)}
    return LCAAttention, options, [(draw(few(20)), layers, heads * channels)], 2


@st.composite
def i2t(draw):
    options = {"in_chans": draw(few(5)), "out_chans": draw(few(70))}
    batch, size = draw(few(3)), (draw(few(50)), draw(few(50)))
    return Image2Tokens, options, [(batch, options["in_chans"], *size)], batch * -(-size[0] // 2) * -(-size[1] // 2)


@st.composite
def add_norm(draw):
    channels, prefix = draw(st.one_of(few(50), st.just(1000))), draw(st.sampled_from([None, 0, 1]))
    shape = (draw(few(9)), draw(few(40)), channels)
    options = {"channels": channels, "affine": draw(_flag), "prefix": prefix}
    return Normed, options, [shape] * draw(st.integers(1, 2)), 2


@st.composite
def attention(draw):
    heads, channels, tokens = draw(few(4)), draw(few(40)), draw(few(150))
    options = {"queries": draw(st.sampled_from([None, draw(st.integers(1, tokens))])), "dim": heads * channels}
    options |= {"num_heads": heads, "qkv_bias": draw(_flag)}
    return FirstQueries, options, [(draw(few(4)), tokens, heads * channels)], 2


@st.composite
def linear(draw):
    options = {"in_features": draw(few(200)), "out_features": draw(few(200)), "bias": draw(_flag)}
    return nn.Linear, options, [(draw(few(5)), draw(few(60)), options["in_features"])], 2


@st.composite
def patches(draw):
    side = draw(st.integers(1, 5))
    options = {"in_channels": draw(few(20)), "out_channels": draw(few(70)), "kernel_size": side, "stride": side}
    size = (draw(st.integers(side, 20)), draw(st.integers(side, 20)))
    return PatchProjection, options | {"bias": draw(_flag)}, [(draw(few(4)), options["in_channels"], *size)], 2


@st.composite
def model(draw):
    heads, batch, side = draw(few(3)), draw(few(3)), draw(st.sampled_from([16, 32]))
    options = {
        "img_size": side, "embed_dim": heads * draw(st.integers(1, 8)), "depth": draw(few(3)), "num_heads": heads,
        "num_classes": draw(few(10)), "mlp_ratio": draw(st.sampled_from([1.0, 2.5])), "qkv_bias": draw(_flag),
        "leff_with_bn": draw(_flag),
    }  # fmt: skip
    return CeiT, options, [(batch, 3, side, side)], batch * (side // 16) ** 2


OPERATORS = {f.__name__: f for f in (leff, lca, i2t, add_norm, attention, linear, patches, model)}


@st.composite
def calls(draw, operator):
    """A ``Call`` of an operator, by name."""
    module, options, shapes, values = draw(OPERATORS[operator]())
    mode = draw(st.sampled_from(["train", "eval", "inference", "frozen"]))
    dtype = draw(st.sampled_from([*[torch.float32, torch.bfloat16] * 3, torch.float64, torch.float16]))
    small = dtype in (torch.float64, torch.float16)  # to which the rule does not apply, and which overflows
    return Call(
        module, options, tuple(shapes), dtype,
        autocast=draw(_flag) if dtype == torch.float32 else False,
        mode=mode,
        norms=draw(st.text("bf", min_size=3, max_size=3)) if values > 1 else "f",
        wide_norms=draw(_flag) if dtype == torch.bfloat16 else False,
        momentum=draw(st.sampled_from([0.1, 1.0, None])),
        view=draw(st.sampled_from(["contiguous", "expanded", "transposed", "strided", "offset", "channels last"])),
        mean=0.0 if small else draw(st.sampled_from([0.0, 0.0, 1e2, 1e3, 1e4])),
        bias=0.0 if small else draw(st.sampled_from([0.0, 0.0, 0.0, 1e2, 1e4])),
        size=1.0 if small else draw(st.sampled_from([1.0, 1.0, 1e-2, 30.0])),
        expanded_gradient=draw(_flag),
        threads=draw(st.integers(1, 2)),
    )  # fmt: skip
