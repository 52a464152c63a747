"""Compiling the Triton kernels of recorded launches ahead of the first one, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from .launch import Launch, nvidia_options

__all__ = ["compile_launches"]


class _Workers(ThreadPoolExecutor):
    """Threads, most of whose time the compiler spends outside of Python, and what they were given."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.futures: list[Future[Any]] = []

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future = super().submit(function, *arguments, **options)
        self.futures.append(future)
        return future


def compile_launches(launches: Sequence[Launch], threads: int, progress: Callable[[int, int], None]) -> int:
    """Compile what launches on the current GPU will look for, as far as this process has not loaded it yet.

    Processes of one machine do so one after another: all but the first find everything in Triton's cache.

    Args:
        launches: recorded ones.
        threads: how many kernels are compiled at a time.
        progress: is told how many are done, and of how many.

    Returns:
        The number of kernels that were compiled or read from the cache.
    """
    import triton
    from triton import knobs

    alone, workers = _alone(Path(knobs.cache.dir)), _Workers(threads)
    with alone, _parsing_in_turn(), workers, triton.AsyncCompileMode(workers):
        for launch in launches:
            # A dtype stands for a tensor whose address is a multiple of 16, as PyTorch's allocations are.
            arguments = [a.dtype if isinstance(a, Tensor) else a for a in launch.arguments.values()]
            options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
            launch.kernel.warmup(
                *arguments, grid=launch.grid, **options, **nvidia_options(launch.num_warps, launch.registers)
            )
        total = len(workers.futures)
        progress(0, total)
        for done, _ in enumerate(as_completed(workers.futures), 1):
            progress(done, total)
    return total


@contextmanager
def _parsing_in_turn() -> Iterator[None]:
    """A block in which one thread at a time parses the source of a kernel.

    Python 3.11.0 to 3.11.7, 3.12.0 and 3.12.1 count the depth of a syntax tree for all threads together, and so raise
    SystemError now and then (https://github.com/python/cpython/issues/106905).
    """
    from triton.runtime import JITFunction

    parse, lock = JITFunction.parse, Lock()

    def in_turn(self: JITFunction[Any]) -> Any:
        with lock:
            return parse(self)

    JITFunction.parse = in_turn
    try:
        yield
    finally:
        JITFunction.parse = parse


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A block that no other process of this machine is in; the system ends it with the process."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "ceit_kernels.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
