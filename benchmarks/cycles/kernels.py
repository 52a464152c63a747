"""What the model has to be told of each kernel: how often its loops run, and where its loads come from."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from math import ceil, prod
from typing import Any, NamedTuple

from ceit_kernels.common.launch import Launch

from .machine import CLOCK, CONDITIONS, SMS, Conditions, Policy, Served, run_cycles
from .sass import Instruction, compile_launch, forked, loops, trace

Arguments = Mapping[str, Any]

_REGISTERS, _SHARED_BYTES, _WARPS, _INSTANCES = 65536, 228 << 10, 64, 32  # of an SM
_MOST = 3  # program instances that a slot runs before the rest is taken to go on likewise


def device(i: Instruction, n: int) -> Served:
    """Read once, from device memory."""
    return Served(i.width * 32, i.width * 32, 2)


def l2(i: Instruction, n: int) -> Served:
    """Read by many program instances at about one time."""
    return Served(i.width * 32, 0, 1)


def shared_by(count: float) -> Policy:
    """A tile that so many neighbours read, of which the first waits for device memory."""
    return lambda i, n: Served(i.width * 32, i.width * 32 / count, 2 if n % 8 < 4 else 1)


def by_unit(loads: Policy, copies: Policy) -> Policy:
    """Loads to registers, and copies to shared memory."""
    return lambda i, n: (copies if i.unit == "copy" else loads)(i, n)


def wide(policy: Policy) -> Policy:
    """Tiles by loads of 16 bytes, vectors of channels by shorter ones."""
    return lambda i, n: policy(i, n) if i.width == 16 else Served(64, 0, 1)


def narrow(policy: Policy) -> Policy:
    """Places by narrow loads; those of 16 bytes are the prefix's, of which there are few."""
    return lambda i, n: Served(0, 0, 1) if i.width == 16 else policy(i, n)


def first_by_l2(count: int) -> Policy:
    """So many loads of what a kernel before has just left, then others, read once."""
    return lambda i, n: (l2 if n <= count else device)(i, n)


def patches(widest: int, shared: float) -> Policy:
    """Places by predicated loads of no more bytes, so many of which read each; weights and taps from L2."""

    def policy(i: Instruction, n: int) -> Served:
        if i.predicated and i.width <= widest:
            return Served(i.width * 32 * 0.6, i.width * 32 / shared, 2)
        return Served(16 if i.width == 8 else i.width * 32, 0, 1)

    return policy


class Kernel(NamedTuple):
    """What a kernel does with memory.

    Attributes:
        policy: where its loads come from.
        runs: of each of its loops in their order, from the launch's arguments.
        first: program instances that take another way through the code than the others, up to where that begins; they
            start first.
    """

    policy: Policy
    runs: Callable[[Arguments], list[int]] = lambda a: []
    first: Callable[[Arguments], int] | None = None


def _steps(total: str, tile: str) -> Callable[[Arguments], list[int]]:
    return lambda a: [ceil(a[total] / a[tile])]


def _tiles(a: Arguments, *pairs: tuple[str, str]) -> int:
    return prod(ceil(a[total] / a[tile]) for total, tile in pairs)


def _products(a: Arguments) -> int:
    """Program instances of a partial product, if it is wanted."""
    if a["p_partial"] is None:
        return 0
    return _tiles(a, ("E", "TILE_E"), ("M", "ROWS")) * ceil(a["C"] / (a["TILE_C"] * a["NUM_C"]))


def _taps(a: Arguments) -> int:
    """Program instances that take the sums of the taps' gradient, if it is among what is wanted."""
    return 0 if a["p_dweight2"] is None else ceil(a["E"] * a["KERNEL"] ** 2 / a["TILE_N"])


def _columns(a: Arguments) -> list[int]:
    """The rows of an image, in the loop over images."""
    return [a["H"] + a["KERNEL"] // 2, a["IMAGES"]]


def _zeroing(a: Arguments) -> list[int]:
    """The tickets of later kernels, if there are any."""
    return [1] * (a["p_tickets"] is not None)


KERNELS = {
    "leff_expand_kernel": Kernel(by_unit(l2, shared_by(24))),
    "leff_contract_kernel": Kernel(patches(8, 4), _steps("E", "TILE_E")),
    "leff_depthwise_inference_kernel": Kernel(
        narrow(device), lambda a: [a["H"]], lambda a: a["B"] * _tiles(a, ("W", "TILE_W"), ("E", "TILE_E"))
    ),
    "leff_expand_moments_kernel": Kernel(by_unit(l2, shared_by(24))),
    "leff_moments_kernel": Kernel(device, _steps("ROWS", "TILE_M")),
    "leff_depthwise_kernel": Kernel(device, _columns),
    "leff_contract_operand_kernel": Kernel(by_unit(wide(device), l2), _steps("E", "TILE_E")),
    "leff_norm_kernel": Kernel(device),
    "leff_norm_sums_kernel": Kernel(device, lambda a: [*_zeroing(a), _tiles(a, ("ROWS", "TILE_M"))]),
    # Of 256 images 131 partial sums, by eight loads for sixteen, and four vectors.
    "leff_norm_gradient_kernel": Kernel(
        first_by_l2(76), lambda a: [_tiles(a, ("T", "TILE_T")), _tiles(a, ("ROWS", "TILE_M"))]
    ),
    "leff_hidden_gradient_kernel": Kernel(by_unit(wide(device), shared_by(24))),
    "leff_slope_kernel": Kernel(device, _steps("ROWS", "TILE_M")),
    "leff_depthwise_backward_kernel": Kernel(device, _columns),
    "leff_statistics_kernel": Kernel(l2, lambda a: [_tiles(a, ("T", "TILE_T"))] * 2),
    "leff_weight_gradient_kernel": Kernel(
        by_unit(l2, shared_by(12)),
        lambda a: [_tiles(a, ("ROWS", "TILE_M"))] * sum(a[name] is not None for name in ("p_partial", "p_gram")),
        _products,
    ),
    "leff_factored_product_kernel": Kernel(
        by_unit(l2, shared_by(12)),
        lambda a: [_tiles(a, ("E", "FOLD_E")), _tiles(a, ("ROWS", "TILE_M"))],
        lambda a: ceil(a["C"] / a["FOLD_C"]) ** 2,
    ),
    # Of its first way the loops over partial sums, unrolled and rest, of the GEMM, and over partial sums of the taps,
    # taken to be in each; then those of the second way.
    "leff_factored_gradient_kernel": Kernel(
        by_unit(wide(device), l2),
        lambda a: [
            a["S"] // 4,
            a["S"] % 4,
            ceil(a["C"] / a["TILE_E"]),
            *[_tiles(a, ("T", "TILE_S")) // 4] * (a["p_dweight2"] is not None),
            ceil(a["E"] / a["TILE_E"]),
            ceil(a["C"] / a["TILE_E"]),
        ],
        lambda a: _tiles(a, ("E", "WEIGHT_E"), ("C", "WEIGHT_C")) + _taps(a),
    ),
}


class Estimate(NamedTuple):
    """Microseconds of a launch on a good day of memory and on a bad one, and what of it is resident on an SM."""

    low: float
    high: float
    registers: int
    shared_bytes: int
    instances: int


def estimate(launch: Launch, kernel: Kernel | None = None) -> Estimate:
    """The time of a launch on an H100.

    Raises:
        LookupError: nothing is known of the kernel, or its loops are others than the entry says.
    """
    name = launch.kernel.__name__
    kernel = kernel or KERNELS.get(name)
    if kernel is None:
        raise LookupError(f"{name}: expected an entry in benchmarks.cycles.kernels.KERNELS, which has {[*KERNELS]}")
    code = compile_launch(launch)
    branches, runs = loops(code.instructions), kernel.runs(launch.arguments)
    if len(branches) != len(runs):
        raise LookupError(f"{name}: expected {len(runs)} loops in its machine code, got {len(branches)}")
    counts, warps = dict(zip(branches, runs, strict=True)), launch.num_warps
    by_registers = _REGISTERS // (ceil(code.registers / 8) * 8 * 32 * warps)
    resident = max(1, min(by_registers, _SHARED_BYTES // (code.shared_bytes + 1024), _WARPS // warps, _INSTANCES))
    times, count = [], 0 if kernel.first is None else kernel.first(launch.arguments)
    for conditions in CONDITIONS:
        if not 0 < count < prod(launch.grid):
            executed = trace(code.instructions, counts)
            seconds = _alike(executed, prod(launch.grid), resident, warps, kernel.policy, conditions)
        else:
            first, rest = forked(code.instructions, counts)
            ways = [(first, count), (rest, prod(launch.grid) - count)]
            seconds = _in_turn(
                [(_alone(way, resident, warps, kernel.policy, conditions), n) for way, n in ways if n],
                SMS * resident,
            )
        times.append(seconds * 1e6)
    return Estimate(*sorted(times), code.registers, code.shared_bytes, resident)


def _alike(
    executed: Sequence[Instruction], count: int, resident: int, warps: int, policy: Policy, conditions: Conditions
) -> float:
    """Seconds of program instances that all execute the same."""
    # Those of fewer than four warps lie in one quarter.
    quarters = 1 if warps >= 4 else 4
    slots = max(1, resident * warps // 4) if quarters == 4 else resident
    each = count / SMS / quarters / slots
    if each < 1:
        slots = max(1, ceil(slots * each))
    rounds = max(1, min(_MOST, ceil(each)))
    cycles = run_cycles(executed, slots, max(1, warps // 4), rounds, policy, conditions)
    waves = ceil(each) if each <= 6 and resident <= 2 else max(1.0, each)
    return cycles / rounds * waves / CLOCK


def _alone(executed: Sequence[Instruction], resident: int, warps: int, policy: Policy, conditions: Conditions) -> float:
    """Cycles of a program instance among as many as are resident."""
    return run_cycles(executed, max(1, resident * min(warps, 4) // 4), max(1, warps // 4), 1, policy, conditions)


def _in_turn(ways: Sequence[tuple[float, int]], slots: int) -> float:
    """Seconds of program instances of so many cycles each, which start in this order wherever one has ended."""
    ends = [0.0] * slots
    for cycles, count in ways:
        for _ in range(count):
            heapq.heapreplace(ends, ends[0] + cycles)
    return max(ends) / CLOCK
