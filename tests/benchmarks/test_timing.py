"""The timers, with a GPU that is not there."""

import pytest
import torch
from support.fake_cuda import FakeCuda

from benchmarks.harness import timing
from benchmarks.harness.timing import CpuTimer, CudaTimer, Sampler, interleave


def test_replays_a_graph_over_all_inputs():
    cuda = FakeCuda()
    sampler = CudaTimer(cuda).prepare(cuda.call, 5)
    captured = cuda.calls[-5:]
    assert captured == [0, 1, 2, 3, 4]
    calls = len(cuda.calls)
    assert sampler.sample() == pytest.approx(1e-3)
    assert len(cuda.calls) == calls
    assert "graph replay" in sampler.method


def test_graphs_of_all_implementations_share_a_pool_of_memory():
    cuda = FakeCuda()
    timer = CudaTimer(cuda)
    for _ in range(3):
        timer.prepare(cuda.call, 2)
    assert len(cuda.pools) == 3
    assert set(map(id, cuda.pools)) == {id(cuda.pools[0])}


def test_says_so_where_nothing_can_be_captured():
    cuda = FakeCuda(capturable=False)
    sampler = CudaTimer(cuda).prepare(cuda.call, 5)
    assert sampler.sample() == pytest.approx(1e-3)
    assert sampler.method == ("CUDA events, host included: no graph (operation not permitted when stream is capturing)")


def test_what_has_graphs_of_its_own_is_not_captured():
    cuda = FakeCuda()
    sampler = CudaTimer(cuda).prepare(cuda.call, 5, capture=False)
    assert cuda.pools == []
    assert sampler.sample() == pytest.approx(1e-3)
    assert sampler.method == "CUDA events, graphs of its own, host included"


def test_implementations_take_turns():
    order = []

    def sampler(name):
        return Sampler(lambda: order.append(name) or 1e-6, "")

    times = interleave({name: sampler(name) for name in "abc"}, 0.0, min_rounds=6)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = [order[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1


class Clock:
    """Time that passes by as much as it is told, whatever else the machine does; a look at it takes a microsecond."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1e-6
        return self.now

    def wait(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_wall_clock(clock):
    sampler = CpuTimer().prepare(lambda i: clock.wait(5e-3), 1)
    assert sampler.sample() == pytest.approx(5e-3, rel=1e-2)
    assert sampler.method == "wall clock"


def test_eager_calls_are_timed_until_they_are_launched_and_until_the_gpu_is_done(clock, monkeypatch):
    cuda = FakeCuda()
    launched = []
    monkeypatch.setattr(cuda, "synchronize", lambda: clock.wait(4e-3 * len(launched)) or launched.clear())

    def call(i):
        clock.wait(1e-3)
        launched.append(i)

    host, wall = CudaTimer(cuda).eager(call, 2)
    assert (host, wall) == (pytest.approx(1e-3, rel=1e-2), pytest.approx(5e-3, rel=1e-2))


def test_first_calls_of_a_sample_are_not_timed(clock):
    calls = []

    def call(i):
        # As if threads of another implementation were spinning: the first call of a sample takes long.
        clock.wait(2e-3 if calls else 0.1)
        calls.append(i)

    calls.append(0)
    sampler = CpuTimer().prepare(call, 1)
    calls.clear()
    assert sampler.sample() == pytest.approx(2e-3, rel=1e-2)


def test_sample_ends_when_the_threads_behind_it_sleep(clock):
    ends = []

    def call(i):
        clock.wait(1e-3)
        ends.append(clock.now)

    sampler = CpuTimer().prepare(call, 1, spinning=0.2)
    assert sampler.sample() == pytest.approx(1e-3, rel=1e-2)
    assert clock.now - ends[-1] > 0.2


@pytest.mark.gpu
def test_times_on_a_gpu():
    x = torch.randn(4096, 4096, device="cuda")
    sampler = CudaTimer().prepare(lambda i: x @ x, 2)
    assert "graph replay" in sampler.method
    assert sampler.sample() > 0
