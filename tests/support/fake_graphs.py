"""CUDA graphs of a GPU that is not there, for tensors on the CPU that say that they are on one.

As on a GPU nothing of a capture happens until the replay, which does again what PyTorch dispatched: on the same memory,
with new random numbers. What was made in a capture holds NaN until then, and waiting for a number is an error.
"""

from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Capture(TorchDispatchMode):
    """Takes down what is dispatched, and what the memory held before."""

    def __init__(self):
        super().__init__()
        self.steps, self._held, self._made = [], {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _WAITING:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        kwargs = kwargs or {}
        for memory in {t.untyped_storage()._cdata: t.untyped_storage() for t in _tensors((args, kwargs))}.values():
            if memory._cdata not in self._made and memory._cdata not in self._held:
                self._held[memory._cdata] = memory, memory.clone()
        results = func(*args, **kwargs)
        # By other tensors of the same memory, in the place of those whose ``data`` may be replaced.
        self.steps.append(tree_map_only(torch.Tensor, torch.Tensor.detach, (func, args, kwargs, results)))
        for memory in (t.untyped_storage() for t in _tensors(results)):
            if memory._cdata not in self._held:
                self._made[memory._cdata] = memory
        return results

    def undo(self):
        for memory, before in self._held.values():
            memory.copy_(before)
        for memory in self._made.values():
            memory.fill_(255)  # a NaN in every floating-point type


class _Device(nullcontext):
    """A class, as PyTorch's is."""


class FakeGraphs:
    """What captures and replays take of ``torch.cuda``.

    Attributes:
        captured, replayed: how often.
    """

    def __init__(self, monkeypatch):
        self.captured, self.replayed, self.capturing = 0, 0, False
        monkeypatch.setattr(torch.cuda, "device", _Device)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        for name in ("Stream", "current_stream", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, lambda *device: mock.Mock(cuda_stream=0))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: mock.Mock(spec=()))
        monkeypatch.setattr(torch.cuda, "graph", self._capture)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)

    @contextmanager
    def _capture(self, graph, pool=None, capture_error_mode="global"):
        capture, self.capturing, generator = _Capture(), True, torch.get_rng_state()
        try:
            with capture:
                yield
        finally:
            self.capturing = False
            capture.undo()
            torch.set_rng_state(generator)

        def replay():
            self.replayed += 1
            with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
                for func, args, kwargs, results in capture.steps:
                    for old, new in zip(_tensors(results), _tensors(func(*args, **kwargs)), strict=True):
                        if old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                            old.copy_(new)

        self.captured += 1
        graph.replay = replay
