"""Plans of calls: what is replayed and when, with kernels that are functions of tensors."""

import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from ceit_kernels import autotune
from ceit_kernels.common import plan
from ceit_kernels.common.launch import launch, record_launches
from ceit_kernels.common.plan import buffer, compute, planned, without_plan


class Kernel:
    """out = a * SCALE + b, and how often Python prepared it or ran it ready."""

    __name__ = "axpy"
    arg_names = ("p_a", "p_b", "p_out", "SCALE", "N")

    def __init__(self):
        self.prepared, self.ready = 0, 0

    def __getitem__(self, grid):
        def run(p_a, p_b, p_out, SCALE, N, num_warps, num_stages, maxnreg):
            self.prepared += 1
            self._run(p_a, p_b, p_out, SCALE, N)
            return Compiled(self)

        return run

    @staticmethod
    def _run(a, b, out, scale, n):
        # Kernels see no shapes, but what follows an address.
        out.view(-1)[:n] = a.reshape(-1)[:n] * scale + (0 if b is None else b.reshape(-1)[:n])


class Compiled:
    """As Triton's compiled kernels are launched."""

    function, packed_metadata = 7, (1, 2)

    def __init__(self, kernel):
        self._kernel = kernel

    def run(self, x, y, z, stream, function, packed_metadata, metadata, enter_hook, exit_hook, *arguments):
        assert (x, y, z) == (1, 1, 1)
        assert (stream, function, packed_metadata) == (0, self.function, self.packed_metadata)
        assert metadata is enter_hook is exit_hook is None
        self._kernel.ready += 1
        self._kernel._run(*arguments)


kernel = Kernel()
foreign = torch.ones(4)


@planned(tensors=2)
def axpy(a, b, scale, how=""):
    """a^2 scale + b by three launches, in float32."""
    square, scratch, out = (buffer(a.shape, torch.float32, a.device) for _ in range(3))
    a = a if a.dtype == torch.float32 else compute(torch.Tensor.to, a, torch.float32)
    a = a + 0 if how == "unknown" else a
    with without_plan():
        launch(kernel, (1,), {"p_a": foreign, "p_out": foreign.clone(), "SCALE": 1, "N": 4}, 4)
    b = torch.zeros(a.shape) if b is None and how == "unknown" else b
    launch(
        kernel,
        (1,),
        {"p_a": a if b is None else b, "p_out": scratch, "SCALE": 0 if b is None else 1, "N": a.numel()},
        4,
    )
    launch(kernel, (1,), {"p_a": a, "p_out": square, "SCALE": scale, "N": a.numel()}, 4)
    square = torch.mul(square, a) if how == "unknown" else compute(torch.mul, square, a)
    launch(kernel, (1, 1), {"p_a": square, "p_b": scratch, "p_out": out, "SCALE": 1, "N": a.numel()}, 4)
    return (out, None) if how == "two" else out


@pytest.fixture(autouse=True)
def forget():
    kernel.prepared = kernel.ready = 0


def check(*arguments):
    a, b, scale = arguments[:3]
    got = axpy(*arguments)
    got = got if isinstance(got, torch.Tensor) else got[0]
    torch.testing.assert_close(got, a.float() ** 2 * scale + (0 if b is None else b))


def test_the_second_call_is_a_loop_over_ready_launches_with_its_own_tensors():
    check(torch.randn(4), torch.randn(4), 2.0)
    assert (kernel.prepared, kernel.ready) == (4, 0)
    for _ in range(3):
        check(torch.randn(4), torch.randn(4), 2.0)
    assert (kernel.prepared, kernel.ready) == (4, 9)


def test_tensors_that_are_one_in_the_first_call_may_be_two_in_the_next():
    x = torch.randn(4)
    check(x, x, 2.0)
    check(x, torch.randn(4), 2.0)
    assert kernel.ready == 3


def test_calls_that_launch_something_else_have_plans_of_their_own():
    x = torch.randn(8)
    for arguments in [
        (x, None, 2.0),
        (x, x, 2.0),
        (x, x, 3.0),
        (x.half(), x, 2.0),
        (x[:4], x[:4], 2.0),
        (x[1:5], x[:4], 2.0),  # another alignment
        (x, x, 2.0, "two"),
    ]:
        check(*arguments)
        assert kernel.ready == 0
    with autotune():
        check(x, x, 2.0)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        check(x, x, 2.0)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert kernel.ready == 0
    check(x, x, 2.0)
    assert kernel.ready == 3


def test_it_counts_which_tensors_begin_at_a_multiple_of_16_bytes_and_nothing_else_of_addresses():
    first, second = torch.randn(2, 96)
    places = [(0, 0), *((i, 0) for i in range(80)), *((0, i) for i in range(80)), *((i, i + 1) for i in range(80))]
    for i, j in places:
        check(first[i : i + 4], second[j : j + 4], 2.0)
    assert len(plan._plans) == len({(i % 4 == 0, j % 4 == 0) for i, j in places}) == 4


def test_several_results_and_missing_ones_are_replayed():
    for _ in range(2):
        out, nothing = axpy(torch.ones(4), None, 2.0, "two")
        assert nothing is None
        assert out.tolist() == [2.0] * 4
    assert kernel.ready == 3


@planned(tensors=2, shaped=(0,))
def copies(a, b, shares):
    """Twice a, by tensors that may share a storage or not."""
    out = [buffer(a.shape, a.dtype, a.device, shares) for _ in range(2)]
    for each in out:
        launch(kernel, (1,), {"p_a": a, "p_b": b, "p_out": each, "SCALE": 1, "N": a.numel()}, 4)
    return out


@pytest.mark.parametrize(("numbers", "shares"), [(32, True), (32, False), (33, True)])
def test_results_share_a_storage_where_they_may_and_stay_aligned(numbers, shares):
    for _ in range(2):
        a, b = torch.randn(2, numbers)[0], torch.randn(numbers)
        first, second = copies(a, b, shares)
        assert torch.equal(first, a + b)
        assert torch.equal(second, a + b)
    shared = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert shared == (shares and numbers % 16 == 0)
    assert kernel.ready == 2


def test_shapes_that_say_those_of_the_others_are_asked_alone():
    for a, b in [(4, 4), (4, 6), (6, 6)]:
        copies(torch.randn(a), torch.randn(b), False)
    assert kernel.ready == 2


def test_a_strided_tensor_counts_as_its_copy():
    for _ in range(2):
        check(torch.randn(4, 4).t(), torch.randn(4, 8)[:, ::2], 2.0)
    assert kernel.ready == 3


def test_what_takes_a_tensor_from_elsewhere_is_never_replayed():
    for _ in range(3):
        check(torch.randn(4), None, 2.0, "unknown")
    assert (kernel.prepared, kernel.ready) == (12, 0)


def test_a_plan_keeps_no_tensor_alive():
    a, b = torch.randn(4), torch.randn(4)
    kept = [weakref.ref(tensor) for tensor in (a, b, axpy(a, b, 2.0), axpy(a, b, 2.0))]
    storage = weakref.ref(a.untyped_storage())
    del a, b
    gc.collect()
    assert all(tensor() is None for tensor in (*kept, storage))


def test_recorded_launches_are_neither_replayed_nor_taken_down():
    x = torch.randn(4)
    for _ in range(2):
        with record_launches() as launches:
            axpy(x, None, 2.0)
        assert len(launches) == 4
    assert not plan._plans


def test_a_profiler_that_is_told_of_launches_is_told_by_tritons_launcher(monkeypatch):
    knobs = SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=[], launch_exit_hook=None))
    monkeypatch.setitem(sys.modules, "triton.knobs", knobs)
    for told, ready in (([], 0), ([print], 0), ([], 3)):
        knobs.runtime.launch_enter_hook = SimpleNamespace(calls=told)
        check(torch.randn(4), None, 2.0)
        assert kernel.ready == ready


def test_an_error_leaves_no_plan_behind():
    with pytest.raises(RuntimeError):
        axpy(torch.randn(4), torch.randn(3), 2.0)
    assert not plan._plans
    check(torch.randn(4), None, 2.0)


def test_the_oldest_plans_are_forgotten(monkeypatch):
    monkeypatch.setattr(plan, "_LIMIT", 2)
    for size in (1, 2, 3):
        check(torch.randn(size), None, 2.0)
    assert len(plan._plans) == 2
    check(torch.randn(3), None, 2.0)
    assert kernel.ready == 3


def test_nothing_is_kept_of_a_capture_that_tuning_had_to_leave_to_the_table(monkeypatch):
    monkeypatch.setattr(plan, "is_capturing", lambda: True)
    with autotune():
        check(torch.randn(4), None, 2.0)
    assert not plan._plans


def test_threads_take_down_and_replay_their_own_calls():
    def work(i):
        for n in range(30):
            check(torch.full((1 + n % 3,), float(i)), torch.full((1 + n % 3,), float(n)), 2.0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
