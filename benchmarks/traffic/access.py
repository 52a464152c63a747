"""What each Triton kernel moves between device memory and the chip, argument by argument, and what it multiplies.

The rule: a launch moves every tensor that it reads or writes once. Three things make an entry other than ``whole``:
a kernel that touches only a part of a tensor; one whose program instances sweep over a tensor again when the sweep
before has passed, which costs device memory again where the tensor is larger than the L2 cache; and a tensor that is
read and written, which stands on both sides. Neighbouring program instances share what they read through the cache,
and weights stay in it.

A kernel without an entry, or a tensor argument that its entry does not name, is an error: whoever adds a kernel adds
its entry to ``KERNELS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from ceit_kernels.common.launch import Launch
from ceit_kernels.tokens.triton import MAX_TENSORS

L2_BYTES = 50 * 2**20  # of an H100

Arguments = Mapping[str, Any]
# How often the bytes of a tensor move in a launch: 1 for all of it once.
Share = Callable[[Launch, Tensor], float]


def whole(launch: Launch, tensor: Tensor) -> float:
    """All of the tensor, once."""
    return 1.0


def image_tokens(launch: Launch, tensor: Tensor) -> float:
    """Of tokens (B, P + H * W, C) those behind the prefix."""
    return 1.0 - prefix_tokens(launch, tensor)


def image_rows(launch: Launch, tensor: Tensor) -> float:
    """Of rows of tokens (B * (P + H * W), C) those behind the prefixes."""
    a = launch.arguments
    return (a["M"] if "M" in a else a["B"] * a["H"] * a["W"]) * tensor.shape[-1] / tensor.numel()


def prefix_tokens(launch: Launch, tensor: Tensor) -> float:
    """Of tokens (B, P + H * W, C) the prefix."""
    return launch.arguments["P"] / tensor.shape[1]


def first_tokens(launch: Launch, tensor: Tensor) -> float:
    """Of a tensor that prefix tokens (B, P, C) are parts of these alone."""
    a = launch.arguments
    return a["M"] // a["N"] * a["P"] * a["C"] / tensor.numel()


def gram_tokens(launch: Launch, tensor: Tensor) -> float:
    """Of tokens (B, PX + H * W, C) those behind the prefix, where their second moments are wanted."""
    return 0.0 if launch.arguments["p_gram"] is None else 1.0 - launch.arguments["PX"] / tensor.shape[1]


def sweeps(count: int) -> Share:
    """All of the tensor, several times."""
    return lambda launch, tensor: count if tensor_bytes(tensor) > L2_BYTES else 1.0


def swept(*axes: int) -> Share:
    """All of the tensor for every program instance along these axes of the grid."""
    return lambda launch, tensor: sweeps(prod(launch.grid[axis] for axis in axes))(launch, tensor)


@dataclass(frozen=True)
class KernelCost:
    """The entry of a kernel.

    Attributes:
        reads: the share that it reads of each tensor, by the argument's name.
        writes: likewise, what it writes.
        flops: of its matmuls, from the launch's arguments.
    """

    reads: Mapping[str, Share]
    writes: Mapping[str, Share]
    flops: Callable[[Arguments], int] = lambda arguments: 0


def _where(arguments: Arguments, pointer: str, count: int) -> int:
    """A number of operations, if there is such a tensor."""
    return 0 if arguments[pointer] is None else count


def _lca_flops(a: Arguments) -> int:
    """Each of the kernels has three matmuls with C x C weights and two of every head's with all tokens."""
    return a["B"] * a["C"] * (6 * a["C"] + 4 * a["C"] // a["D"] * a["L"])


def _cost(
    reads: str, writes: str, flops: Callable[[Arguments], int] = lambda arguments: 0, **parts: Share
) -> KernelCost:
    """The entry of a kernel that moves these tensors whole, and reads `parts` of others; names are without `p_`."""
    read, written = ({f"p_{name}": whole for name in names.split()} for names in (reads, writes))
    return KernelCost(read | {f"p_{name}": share for name, share in parts.items()}, written, flops)


def _leff_layer(i: int) -> str:
    """The parameters of a layer of LeFF."""
    return f" weight{i} bias{i} norm_weight{i} norm_bias{i} running_mean{i} running_var{i} "


def _running(i: int | str) -> str:
    """The running statistics of a layer."""
    return f"running_mean{i} running_var{i} batches{i}"


# Of kernels whose last program instances finish a norm's statistics, beside the moments.
_READ = f" partial count tickets norm_weight norm_bias {_running('')}"
_WRITTEN = f" partial count tickets norm total {_running('')}"

KERNELS: dict[str, KernelCost] = {
    "leff_expand_kernel": _cost(
        _leff_layer(1) + _leff_layer(2), "h rows2", lambda a: 2 * a["M"] * a["C"] * a["E"], x=image_tokens
    ),
    "leff_contract_kernel": _cost(
        _leff_layer(3) + "h rows2 residual",
        "out",
        lambda a: 2 * a["B"] * a["H"] * a["W"] * a["E"] * (a["O"] + a["KERNEL"] ** 2),
        x=prefix_tokens,
    ),
    "leff_depthwise_inference_kernel": _cost(
        "weight2 bias2 weight3 bias3 residual"
        + "".join(f" norm_weight{i} norm_bias{i} running_mean{i} running_var{i}" for i in (1, 2, 3)),
        "h2 norm3 scaled added",
        lambda a: 2 * a["B"] * a["H"] * a["W"] * a["E"] * a["KERNEL"] ** 2,
        z1=image_rows,
        x=prefix_tokens,
    ),
    "leff_moments_kernel": _cost(_READ, _WRITTEN, z=image_rows),
    "leff_slope_kernel": _cost(
        "z2 norm2 partial tickets total",
        "g2 h2 partial tickets gradient dbias dnorm_weight dnorm_bias",
        dh2=image_rows,
    ),
    "leff_expand_moments_kernel": _cost(
        "weight bias" + _READ, "z1" + _WRITTEN, lambda a: 2 * a["M"] * a["C"] * a["E"], x=image_tokens
    ),
    # Column tiles of an image are neighbours in launch order and share their margins.
    "leff_depthwise_kernel": _cost(
        "norm1 weight2 bias" + _READ,
        "z2" + _WRITTEN,
        lambda a: 2 * a["B"] * a["H"] * a["W"] * a["E"] * a["KERNEL"] ** 2,
        z1=image_rows,
    ),
    "leff_contract_operand_kernel": _cost(
        "a z rows weight bias residual" + _READ,
        "out operand" + _WRITTEN,
        lambda a: 2 * a["M"] * a["E"] * a["O"],
        prefix=prefix_tokens,
    ),
    "leff_norm_kernel": _cost("z3 norm3 residual", "out", x=prefix_tokens),
    "leff_norm_sums_kernel": _cost("z3 norm3", "partial tickets", dout=image_tokens),
    "leff_norm_gradient_kernel": _cost(
        "z3 norm3 partial total", "dz3 dbias dnorm_weight dnorm_bias", dout=image_tokens
    ),
    "leff_hidden_gradient_kernel": _cost(
        "weight z2 norm2", "g2 partial", lambda a: 2 * a["M"] * a["O"] * a["E"], dz3=image_tokens
    ),
    "leff_depthwise_backward_kernel": _cost(
        "g2 z2 gradient2 norm1 weight2 partial tickets total",
        "g1 taps_gradient partial tickets gradient dbias dnorm_weight dnorm_bias",
        lambda a: 4 * a["B"] * a["H"] * a["W"] * a["E"] * a["KERNEL"] ** 2,
        z1=image_rows,
    ),
    # The tiles of one range of tokens run side by side and share what they read.
    "leff_weight_gradient_kernel": _cost(
        "a z rows",
        "partial gram sums",
        lambda a: a["M"] * (_where(a, "p_partial", 2 * a["E"] * a["C"]) + _where(a, "p_gram", a["CX"] * (a["CX"] + 1))),
        tokens=image_tokens,
        x=gram_tokens,
    ),
    "leff_statistics_kernel": _cost(
        f"count norm_weight norm_bias {_running('')}",
        f"norm total {_running('')}",
        partial=sweeps(2),
    ),
    "leff_running_kernel": _cost(
        f"total norm1 norm2 norm3 {_running(1)} {_running(2)} {_running(3)}",
        f"{_running(1)} {_running(2)} {_running(3)}",
    ),
    "leff_reduce_kernel": _cost(
        "partial norm total partial1 partial2 partial3 partial4",
        "sums gradient dbias dnorm_weight dnorm_bias out1 out2 out3 out4",
    ),
    "leff_factored_product_kernel": _cost(
        "a weight gradient",
        "partial folded tail bias",
        lambda a: 2 * a["E"] * a["C"] * (_where(a, "p_partial", a["M"]) + _where(a, "p_tail", a["C"])),
        tokens=image_tokens,
    ),
    "leff_factored_gradient_kernel": _cost(
        "a folded tail bias total partial weight gradient gram sums all_sums taps_gradient",
        "out dweight dweight2",
        lambda a: (
            2 * a["M"] * a["C"] * (_where(a, "p_out", a["E"]) + _where(a, "p_tail", a["C"]))
            + _where(a, "p_gram", 2 * a["E"] * a["C"] ** 2)
        ),
        tokens=image_tokens,
        prefix=prefix_tokens,
    ),
    "join_tokens_kernel": _cost(" ".join(map(str, range(MAX_TENSORS))) + " added positions", "out"),
    "column_sums_kernel": _cost("rows0 rows1 rows2 rows3", "sum0 sum1 sum2 sum3 first rest"),
    "qkv_gradient_kernel": _cost("dq dk dv dout partial tickets", "dqkv dbias dout_bias partial tickets"),
    "add_norm_forward_kernel": _cost("x branch weight bias", "total out prefix mean rstd tickets"),
    "add_norm_backward_kernel": _cost(
        "dout dtotal total weight mean rstd partial tickets",
        "dx partial tickets dweight dbias",
        dprefix=first_tokens,
    ),
    # The second axis is the heads', each of which sweeps over all channels of x.
    "lca_forward_kernel": _cost("weight bias seed", "out", _lca_flops, x=swept(1)),
    "lca_backward_scores_kernel": _cost("weight bias seed grad", "q dq p ds", _lca_flops, x=swept(1)),
    # The axes behind the first are blocks of channels, and of layers.
    "lca_backward_input_kernel": _cost(
        "weight", "dx", _lca_flops, **dict.fromkeys(("grad", "q", "dq", "p", "ds"), swept(1, 2))
    ),
    # Heads are neighbours in launch order, blocks of channels are a sweep apart, and each takes its own columns of x.
    "lca_backward_weight_kernel": _cost(
        "x", "dweight dbias", _lca_flops, **dict.fromkeys(("grad", "q", "dq", "p", "ds"), swept(1))
    ),
}


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: those that an expansion repeats count once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return prod(size if stride else min(size, 1) for size, stride in sizes) * tensor.itemsize


def launch_bytes(launch: Launch) -> int:
    """Bytes of device memory that a launch reads and writes.

    Raises:
        LookupError: ``KERNELS`` has no entry for the kernel, or the entry does not name a tensor of the launch.
    """
    cost = _entry(launch)
    moved: dict[int, tuple[float, float, int]] = {}
    for name, tensor in launch.arguments.items():
        if not isinstance(tensor, Tensor):
            continue
        if name not in cost.reads and name not in cost.writes:
            raise LookupError(
                f"{launch.kernel.__name__}: expected every tensor in the kernel's entry of "
                f"benchmarks.traffic.access.KERNELS, got {name} beside {sorted({*cost.reads, *cost.writes})}"
            )
        # A tensor that is passed twice is one.
        shares = [by[name](launch, tensor) if name in by else 0.0 for by in (cost.reads, cost.writes)]
        read, written = map(max, shares, moved.get(id(tensor), (0.0, 0.0)))
        moved[id(tensor)] = read, written, tensor_bytes(tensor)
    return round(sum((read + written) * size for read, written, size in moved.values()))


def launch_flops(launch: Launch) -> int:
    """FLOPs of a launch's matmuls and convolutions."""
    return _entry(launch).flops(launch.arguments)


def _entry(launch: Launch) -> KernelCost:
    name = launch.kernel.__name__
    if name not in KERNELS:
        raise LookupError(f"{name}: expected an entry in benchmarks.traffic.access.KERNELS, which has {[*KERNELS]}")
    return KERNELS[name]


def touched_again(operator: Any, arguments: Sequence[Any]) -> int:
    """Bytes that later launches of a compiled operator move, of tensors that its first launch read or wrote.

    Behind the stem's forward pass with the batch's statistics the moments are read, and the result is read and written
    to be normalised; behind its backward pass the sums are read.
    """
    if str(operator) == "ceit._i2t_forward":
        moments, out = arguments[7], arguments[8]
        return 0 if moments is None else tensor_bytes(moments) + 2 * tensor_bytes(out)
    if str(operator) == "ceit._i2t_backward":
        return tensor_bytes(arguments[8])
    return 0
