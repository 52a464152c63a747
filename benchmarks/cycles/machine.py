"""A quarter of an SM of an H100: its warps, its units, and its share of L2 and of device memory."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .sass import Instruction

CLOCK, SMS = 1.755e9, 132  # of an H100 at its usual clock
DEVICE_BYTES = 12.9  # a clock and SM: 3.0 TB/s
_INTERVALS = {"fma": 1, "half": 2, "alu": 2, "uniform": 2}  # cycles between instructions of a unit
# A ticket waits until all stores are in L2, and for an addition there.
_LATENCIES = {"uniform": 12, "constant": 30, "warpgroup": 12, "ticket": 1500}
_RESULT = 6  # cycles to the result of any other


class Conditions(NamedTuple):
    """What memory is like, on a good day or a bad one.

    Attributes:
        latencies: cycles of a load that L1, L2 and device memory serve.
        l2_bytes: a clock and SM.
    """

    latencies: tuple[int, int, int]
    l2_bytes: float


CONDITIONS = (Conditions((38, 280, 720), 30.0), Conditions((38, 350, 900), 26.0))


class Served(NamedTuple):
    """Where a warp's load comes from: bytes of L2 and of device memory, and whose latency it has, as 0 (L1), 1 or 2."""

    l2: float
    device: float
    latency: int


# Where the n-th load of a warp comes from.
Policy = Callable[[Instruction, int], Served]


@dataclass(slots=True, eq=False)
class _Warp:
    """A warp's place among the resident ones, which runs one program instance after another."""

    slot: int
    left: int
    counter: int = 0
    loads: int = 0
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 6)
    copies: list[float] = field(default_factory=list)  # those that no group holds yet
    groups: deque[float] = field(default_factory=deque)  # of copies
    products: deque[float] = field(default_factory=deque)  # of groups of a warpgroup's products
    product_end: float = 0.0


class _Quarter:
    """The state of the units, each free again at a time, and of memory's queues."""

    def __init__(self, policy: Policy, conditions: Conditions) -> None:
        self.policy, self.latencies, self.l2 = policy, conditions.latencies, conditions.l2_bytes / 4
        self.units = dict.fromkeys((*_INTERVALS, "special", "tensor"), 0.0)
        self.load_store = self.l2_free = self.device_free = 0.0

    def ready(self, warp: _Warp, i: Instruction, at: float) -> float:
        """When the instruction can be issued."""
        if i.waits:
            at = max([at, *(warp.scoreboards[b] for b in range(6) if i.waits >> b & 1)])
        queue = {"wait for copies": warp.groups, "wait for products": warp.products}.get(i.unit)
        while queue and len(queue) > i.count:
            at = max(at, queue.popleft())
        if i.unit in self.units:
            at = max(at, self.units[i.unit])
        elif i.unit in ("load", "store", "copy", "shared load", "shared store"):
            at = max(at, self.load_store - 64)  # that many cycles of requests may queue
        return at

    def issue(self, warp: _Warp, i: Instruction, at: float) -> tuple[float, float]:
        """Execute it; when its result is there, and when the warp goes on."""
        result, goes_on = at + _LATENCIES.get(i.unit, _RESULT), at + max(1, i.stall)
        if i.unit in _INTERVALS:
            self.units[i.unit] = at + _INTERVALS[i.unit]
        elif i.unit == "special":
            self.units["special"] = at + 8
            result = at + 26
        elif i.unit == "tensor":
            self.units["tensor"] = at + 6.5
            result = at + 33
        elif i.unit in ("shared load", "shared store"):
            result = self._request(i, at) + 24
        elif i.unit in ("load", "copy"):
            warp.loads += 1
            result = self._load(self.policy(i, warp.loads), self._request(i, at), at)
            if i.unit == "copy":
                warp.copies.append(result)
        elif i.unit == "store":
            result = self._request(i, at) + 20
            self.device_free = max(self.device_free, at) + i.width * 32 / (DEVICE_BYTES / 4)
            self.l2_free = max(self.l2_free, at) + i.width * 32 / self.l2
            goes_on = max(goes_on, self.device_free - 3000)  # what L2 takes before stores wait
        elif i.unit == "commit":
            warp.groups.append(max(warp.copies, default=at))
            warp.copies = []
        elif i.unit == "warpgroup":
            self._multiply(warp, i, at)
        elif i.unit == "branch":
            goes_on = max(goes_on, at + 8)
        if i.sets != 7:
            warp.scoreboards[i.sets] = max(warp.scoreboards[i.sets], result)
        if i.frees != 7:
            read = max(at + 12, self.load_store) if i.unit in ("store", "shared store") else at + 12
            warp.scoreboards[i.frees] = max(warp.scoreboards[i.frees], read)
        return result, goes_on

    def _request(self, i: Instruction, at: float) -> float:
        """When the load and store unit has passed on a request, 128 bytes a clock for the four quarters."""
        self.load_store = max(self.load_store, at) + 4 * max(1, i.width * 32 / 128)
        return self.load_store

    def _load(self, served: Served, passed: float, at: float) -> float:
        result = passed + self.latencies[served.latency]
        if served.l2:
            self.l2_free = max(self.l2_free, at) + served.l2 / self.l2
            result = max(result, self.l2_free + self.latencies[served.latency])
        if served.device:
            self.device_free = max(self.device_free, at) + served.device / (DEVICE_BYTES / 4)
            result = max(result, self.device_free + self.latencies[2])
        return result

    def _multiply(self, warp: _Warp, i: Instruction, at: float) -> None:
        """A warpgroup's product, 64 x n x 16: n / 2 cycles, and its operands through shared memory."""
        self.units["tensor"] = end = max(self.units["tensor"], at) + i.count / 2
        operands = i.count * 16 * 2 + (64 * 16 * 2 if i.from_shared else 0)
        self.load_store = max(self.load_store, at) + operands / 128
        warp.product_end = max(end, self.load_store) + 30
        if i.ends_group:
            warp.products.append(warp.product_end)


def run_cycles(
    executed: Sequence[Instruction],
    slots: int,
    warps: int,
    instances: int,
    policy: Policy,
    conditions: Conditions,
) -> float:
    """Cycles in which a quarter of an SM is done.

    Args:
        executed: the instructions of a warp, one after another.
        slots: program instances that are resident at a time.
        warps: of each of them in this quarter.
        instances: that each slot runs one after another.
        policy, conditions: of memory.
    """
    quarter = _Quarter(policy, conditions)
    resident = [_Warp(slot, instances) for slot in range(slots) for _ in range(warps)]
    # Program instances start 300 cycles apart.
    queue = [(300.0 * warp.slot, n) for n, warp in enumerate(resident)]
    waiting: dict[int, list[tuple[int, float]]] = {}
    now = end = 0.0
    heapq.heapify(queue)
    while queue:
        at, n = heapq.heappop(queue)
        warp = resident[n]
        if warp.counter >= len(executed):
            warp.left, warp.counter = warp.left - 1, 0
            if warp.left > 0:
                heapq.heappush(queue, (at + 60, n))
            else:
                end = max(end, at)
            continue
        instruction = executed[warp.counter]
        ready = max(now, quarter.ready(warp, instruction, at))
        if ready > at + 1e-9:
            heapq.heappush(queue, (ready, n))
            continue
        now = at + 1  # one instruction a cycle
        _, goes_on = quarter.issue(warp, instruction, at)
        warp.counter += 1
        if instruction.unit != "barrier":
            heapq.heappush(queue, (goes_on, n))
            continue
        arrived = waiting.setdefault(warp.slot, [])
        arrived.append((n, goes_on))
        if len(arrived) == warps:
            opens = max(time for _, time in arrived) + 22
            for each, _ in waiting.pop(warp.slot):
                heapq.heappush(queue, (opens, each))
    return end
