"""Events, graphs, streams and a profiler of a GPU that is not there."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

from torch.autograd import DeviceType
from triton.runtime.jit import JITFunction


class FakeCuda:
    """Events that read a clock which every call that is not captured, and every replay of one, moves by 1 ms.

    Attributes:
        calls: arguments of the calls so far.
        pools: of the graphs so far.
    """

    def __init__(self, capturable=True):
        self.milliseconds, self.calls, self.capturing, self.capturable = 0.0, [], False, capturable
        self.pools = []
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.milliseconds

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        class CUDAGraph:
            kernels = 0

            def replay(self):
                fake.milliseconds += self.kernels

        self.Event, self.CUDAGraph = Event, CUDAGraph

    class Stream:
        def wait_stream(self, other):
            pass

    def current_stream(self):
        return self.Stream()

    @contextmanager
    def stream(self, stream):
        yield

    def synchronize(self):
        assert not self.capturing

    def graph_pool_handle(self):
        return object()

    @contextmanager
    def graph(self, graph, pool=None, capture_error_mode="global"):
        self.pools.append(pool)
        self.capturing, before = True, len(self.calls)
        try:
            yield
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            graph.kernels = len(self.calls) - before
        finally:
            self.capturing = False

    def call(self, i):
        self.calls.append(i)
        if not self.capturing:
            self.milliseconds += 1

    def timed(self, function):
        """The function, each call of which is seen by the clock and by a graph that is captured."""

        def call(i):
            self.call(i)
            return function(i)

        return call


class FakeProfile:
    """A profiler that sees the launches of Triton kernels, each of which takes a microsecond."""

    def __init__(self, activities):
        self._names, self._patch = [], None

    def __enter__(self):
        right = JITFunction.run

        def run(kernel, *args, **kwargs):
            self._names.append(kernel.__name__)
            return right(kernel, *args, **kwargs)

        self._patch = mock.patch.object(JITFunction, "run", run)
        self._patch.start()
        return self

    def __exit__(self, *exception):
        self._patch.stop()

    def events(self):
        """Events as `torch.profiler.profile.events` has them."""
        interval = SimpleNamespace(elapsed_us=lambda: 1.0)
        return [SimpleNamespace(device_type=DeviceType.CUDA, name=n, time_range=interval) for n in self._names]

    @property
    def profiler(self):
        """The events as kineto has them."""
        events = [SimpleNamespace(device_type=lambda: DeviceType.CUDA) for _ in self._names]
        return SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))
