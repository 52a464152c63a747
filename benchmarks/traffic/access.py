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


def prefix_tokens(launch: Launch, tensor: Tensor) -> float:
    """Of tokens (B, P + H * W, C) the prefix."""
    return launch.arguments["P"] / tensor.shape[1]


def operand_tokens(launch: Launch, tensor: Tensor) -> float:
    """Of an operand (B, PA + H * W, E) the tokens behind its prefix, of one without a prefix all."""
    return 1.0 - launch.arguments["PA"] / tensor.shape[1]


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


def _lca_flops(a: Arguments) -> int:
    """Each of the kernels has three matmuls with C x C weights and two of every head's with all tokens."""
    return a["B"] * a["C"] * (6 * a["C"] + 4 * a["C"] // a["D"] * a["L"])


def _all(*names: str) -> dict[str, Share]:
    return dict.fromkeys(names, whole)


def _leff_layer(i: int) -> dict[str, Share]:
    """The parameters of a layer of LeFF."""
    return _all(
        *(f"p_{name}{i}" for name in ("weight", "bias", "norm_weight", "norm_bias", "running_mean", "running_var"))
    )


_LCA_PARAMETERS = _all("p_weight", "p_bias", "p_seed")

KERNELS: dict[str, KernelCost] = {
    "leff_expand_kernel": KernelCost(
        reads={
            **_leff_layer(1),
            **_leff_layer(2),
            "p_x": image_tokens,
        },
        writes=_all("p_h", "p_rows2"),
        flops=lambda a: 2 * a["M"] * a["C"] * a["E"],
    ),
    "leff_contract_kernel": KernelCost(
        reads={
            **_leff_layer(3),
            **_all("p_h", "p_rows2", "p_residual"),
            "p_x": prefix_tokens,
        },
        writes=_all("p_out"),
        flops=lambda a: 2 * a["B"] * a["H"] * a["W"] * a["E"] * (a["O"] + a["KERNEL"] ** 2),
    ),
    "leff_expand_moments_kernel": KernelCost(
        reads={**_all("p_weight", "p_bias"), "p_x": image_tokens},
        writes=_all("p_z1", "p_partial", "p_count"),
        flops=lambda a: 2 * a["M"] * a["C"] * a["E"],
    ),
    # Column tiles of an image are neighbours in launch order and share their margins.
    "leff_depthwise_kernel": KernelCost(
        reads=_all("p_z1", "p_norm1", "p_taps", "p_bias"),
        writes=_all("p_z2", "p_partial", "p_count"),
        flops=lambda a: 2 * a["B"] * a["H"] * a["W"] * a["E"] * a["KERNEL"] ** 2,
    ),
    "leff_contract_operand_kernel": KernelCost(
        reads={
            **_all("p_a", "p_z", "p_rows", "p_weight", "p_bias", "p_mean", "p_tail", "p_residual"),
            "p_tokens": image_tokens,
            "p_prefix": prefix_tokens,
        },
        writes=_all("p_out", "p_partial", "p_count", "p_operand"),
        flops=lambda a: 2 * a["M"] * (a["E"] + (0 if a["p_tail"] is None else a["O"])) * a["O"],
    ),
    "leff_norm_kernel": KernelCost(
        reads={**_all("p_z3", "p_norm3", "p_residual"), "p_x": prefix_tokens},
        writes=_all("p_out"),
    ),
    "leff_norm_sums_kernel": KernelCost(
        reads={**_all("p_z3", "p_norm3"), "p_dout": image_tokens},
        writes=_all("p_partial"),
    ),
    "leff_norm_gradient_kernel": KernelCost(
        reads={**_all("p_z3", "p_gradient3"), "p_dout": image_tokens},
        writes=_all("p_dz3"),
    ),
    "leff_hidden_gradient_kernel": KernelCost(
        reads={**_all("p_weight", "p_z2", "p_norm2"), "p_dz3": image_tokens},
        writes=_all("p_g2", "p_partial"),
        flops=lambda a: 2 * a["M"] * a["O"] * a["E"],
    ),
    "leff_depthwise_backward_kernel": KernelCost(
        reads=_all("p_g2", "p_z2", "p_z1", "p_gradient2", "p_norm1", "p_taps"),
        writes=_all("p_g1", "p_taps_gradient", "p_partial"),
        flops=lambda a: 4 * a["B"] * a["H"] * a["W"] * a["E"] * a["KERNEL"] ** 2,
    ),
    # The tiles of one range of tokens run side by side and share what they read.
    "leff_weight_gradient_kernel": KernelCost(
        reads={**_all("p_z", "p_rows"), "p_a": operand_tokens, "p_tokens": image_tokens},
        writes=_all("p_partial", "p_sums"),
        flops=lambda a: 2 * a["M"] * a["E"] * a["C"],
    ),
    "leff_statistics_kernel": KernelCost(
        reads={**_all("p_count", "p_weight", "p_bias"), "p_partial": sweeps(2)},
        writes=_all("p_norm", "p_total"),
    ),
    "leff_coefficients_kernel": KernelCost(
        reads=_all("p_partial", "p_norm", "p_total"),
        writes=_all("p_sums", "p_gradient", "p_dbias", "p_dnorm_weight", "p_dnorm_bias"),
    ),
    "leff_fold_gradient_kernel": KernelCost(
        reads=_all("p_weight", "p_gradient", "p_total", "p_sums"),
        writes=_all("p_folded", "p_tail", "p_bias", "p_mean"),
        flops=lambda a: 0 if a["p_tail"] is None else 2 * a["E"] * a["C"] ** 2,
    ),
    "leff_factored_weight_kernel": KernelCost(
        reads=_all("p_partial", "p_weight", "p_gradient", "p_gram", "p_sums", "p_mean"),
        writes=_all("p_out"),
        flops=lambda a: 0 if a["p_gram"] is None else 2 * a["E"] * a["C"] ** 2,
    ),
    "leff_sum_kernel": KernelCost(reads=_all("p_partial"), writes=_all("p_out")),
    "add_norm_forward_kernel": KernelCost(
        reads=_all("p_x", "p_branch", "p_weight", "p_bias"),
        writes=_all("p_total", "p_out", "p_prefix", "p_mean", "p_rstd"),
    ),
    "add_norm_backward_kernel": KernelCost(
        reads=_all("p_dout", "p_dtotal", "p_dprefix", "p_total", "p_weight", "p_mean", "p_rstd"),
        writes=_all("p_dx", "p_partial"),
    ),
    "add_norm_parameters_kernel": KernelCost(reads=_all("p_partial"), writes=_all("p_dweight", "p_dbias")),
    # The second axis is the heads', each of which sweeps over all channels of x.
    "lca_forward_kernel": KernelCost(
        reads={**_LCA_PARAMETERS, "p_x": swept(1)},
        writes=_all("p_out"),
        flops=_lca_flops,
    ),
    "lca_backward_scores_kernel": KernelCost(
        reads={**_LCA_PARAMETERS, "p_x": swept(1), "p_grad": whole},
        writes=_all("p_q", "p_dq", "p_p", "p_ds"),
        flops=_lca_flops,
    ),
    # The axes behind the first are blocks of channels, and of layers.
    "lca_backward_input_kernel": KernelCost(
        reads={**_all("p_weight"), **dict.fromkeys(("p_grad", "p_q", "p_dq", "p_p", "p_ds"), swept(1, 2))},
        writes=_all("p_dx"),
        flops=_lca_flops,
    ),
    # Heads are neighbours in launch order, blocks of channels are a sweep apart, and each takes its own columns of x.
    "lca_backward_weight_kernel": KernelCost(
        reads={**_all("p_x"), **dict.fromkeys(("p_grad", "p_q", "p_dq", "p_p", "p_ds"), swept(1))},
        writes=_all("p_dweight", "p_dbias"),
        flops=_lca_flops,
    ),
}


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: those that an expansion repeats count once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.itemsize


def launch_bytes(launch: Launch) -> int:
    """Bytes of device memory that a launch reads and writes.

    Raises:
        LookupError: ``KERNELS`` has no entry for the kernel, or the entry does not name a tensor of the launch.
    """
    cost = _cost(launch)
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
        read, written, _ = moved.get(id(tensor), (0.0, 0.0, 0))
        if name in cost.reads:
            read = max(read, cost.reads[name](launch, tensor))
        if name in cost.writes:
            written = max(written, cost.writes[name](launch, tensor))
        moved[id(tensor)] = read, written, tensor_bytes(tensor)
    return round(sum((read + written) * size for read, written, size in moved.values()))


def launch_flops(launch: Launch) -> int:
    """FLOPs of a launch's matmuls and convolutions."""
    return _cost(launch).flops(launch.arguments)


def _cost(launch: Launch) -> KernelCost:
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
