"""Timing: a sample of an implementation on the CPU or on a GPU, and rounds in which implementations take turns."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from types import ModuleType
from typing import Any

import torch

from ceit.runtime.machine import keep_freed_memory

_WARMUP_CALLS = 3
# Shorter samples are lost in the clock and in the interpreter's jitter.
_SAMPLE_SECONDS = 3e-2
# Calls ahead of a sample, until the threads of the implementation before do not spin any more; a long one does without.
_SETTLE_SECONDS, _LONG_CALL_SECONDS = 3e-2, 0.2
# More calls would fill the queue of launches, so that the host waits for the GPU.
_EAGER_ROUNDS, _EAGER_CALLS = 5, 5


@dataclass(frozen=True)
class Sampler:
    """A prepared implementation.

    Attributes:
        sample: runs it and returns the seconds of one call.
        method: how a call was timed.
    """

    sample: Callable[[], float]
    method: str


class CpuTimer:
    """Wall-clock time of calls one after another, as many as make a sample long enough.

    Threads that wait for work spin for a while, on cores that the next implementation needs. So calls that are not
    timed go ahead of a sample, and a sample ends when the threads behind it have gone to sleep.
    """

    def __init__(self) -> None:
        keep_freed_memory()  # for all implementations alike

    def prepare(self, call: Callable[[int], Any], num_inputs: int, spinning: float = 0.0) -> Sampler:
        """Warm up and return the sampler.

        Args:
            call: runs the implementation on input i.
            num_inputs: inputs to rotate through.
            spinning: seconds for which its threads go on spinning after a call.
        """
        call(0)
        start = time.perf_counter()
        call(1 % num_inputs)
        seconds = max(time.perf_counter() - start, 1e-7)
        repeats = max(1, round(_SAMPLE_SECONDS / seconds))
        ahead = 0 if seconds > _LONG_CALL_SECONDS else max(1, round(_SETTLE_SECONDS / seconds))

        def run(calls: int) -> float:
            start = time.perf_counter()
            for i in range(calls):
                call(i % num_inputs)
            return time.perf_counter() - start

        def sample() -> float:
            run(ahead)
            seconds = run(repeats) / repeats
            end = time.perf_counter() + spinning
            # Asleep, a virtual machine would lose its cores.
            while time.perf_counter() < end:
                pass
            return seconds

        return Sampler(sample, "wall clock")


class CudaTimer:
    """CUDA events around the replay of a graph that calls the implementation once for each input.

    The replay leaves the host's time out. What cannot be captured is launched call by call between the events, and the
    sampler's method says so.

    Args:
        cuda: stands for `torch.cuda`.
    """

    def __init__(self, cuda: ModuleType | Any = torch.cuda) -> None:
        self._cuda = cuda
        # Graphs that are replayed one after the other share memory: a pool each for ten implementations would not fit.
        self._pool = cuda.graph_pool_handle()

    def prepare(
        self, call: Callable[[int], Any], num_inputs: int, spinning: float = 0.0, capture: bool = True
    ) -> Sampler:
        """Warm up, capture and return the sampler; arguments as of `CpuTimer.prepare`.

        Args:
            capture: False for what replays graphs of its own.
        """
        cuda = self._cuda
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for i in range(_WARMUP_CALLS):
                call(i % num_inputs)
        cuda.current_stream().wait_stream(stream)
        cuda.synchronize()

        def run() -> None:
            for i in range(num_inputs):
                call(i)

        if not capture:
            return Sampler(lambda: self._elapsed(run) / num_inputs, "CUDA events, graphs of its own, host included")
        replay, method = run, "CUDA events"
        graph = cuda.CUDAGraph()
        try:
            with cuda.graph(graph, pool=self._pool):
                run()
        except RuntimeError as error:
            reason = str(error).strip().splitlines() or ["no reason given"]
            method = f"CUDA events, host included: no graph ({reason[0]})"
        else:
            replay, method = graph.replay, "CUDA events, graph replay"
        replay()
        cuda.synchronize()
        return Sampler(lambda: self._elapsed(replay) / num_inputs, method)

    def eager(self, call: Callable[[int], Any], num_inputs: int) -> tuple[float, float]:
        """Seconds of a call without a graph: until Python has launched everything, and until the GPU is done.

        Medians of rounds, in each of which calls follow one another without waiting. Where the second is not much
        longer than the first, the host is what takes the time.
        """
        rounds = []
        for _ in range(_EAGER_ROUNDS):
            self._cuda.synchronize()
            start = time.perf_counter()
            for i in range(_EAGER_CALLS):
                call(i % num_inputs)
            launched = time.perf_counter()
            self._cuda.synchronize()
            rounds.append((launched - start, time.perf_counter() - start))
        host, wall = (median(each) / _EAGER_CALLS for each in zip(*rounds, strict=True))
        return host, wall

    def _elapsed(self, run: Callable[[], Any]) -> float:
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def make_timer(device: torch.device) -> CpuTimer | CudaTimer:
    """The timer of a device."""
    return CudaTimer() if device.type == "cuda" else CpuTimer()


def interleave(
    samplers: Mapping[str, Sampler], seconds: float, *, min_rounds: int = 5, max_rounds: int = 50
) -> dict[str, list[float]]:
    """Sample every implementation once a round, in an order that is drawn anew for each round.

    Args:
        samplers: prepared implementations by name.
        seconds: wall-clock time to spend; the smallest number of rounds is taken whatever it costs.
        min_rounds: fewest rounds.
        max_rounds: most rounds.

    Returns:
        Seconds of a call by name, in the order of the rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in samplers}
    order, generator = list(samplers), random.Random(0)
    start = time.perf_counter()
    for done in range(max_rounds if samplers else 0):
        if done >= min_rounds and time.perf_counter() - start > seconds:
            break
        generator.shuffle(order)
        for name in order:
            times[name].append(samplers[name].sample())
    return times
