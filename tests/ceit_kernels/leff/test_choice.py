"""Which backend serves LeFF on a GPU under `auto`. Time is a number here, and Triton's interpreter the GPU."""

import copy

import pytest
import torch
from support.leff import make_call, run, train_step

import ceit_kernels
from ceit_kernels import backends
from ceit_kernels.common import choice as measuring
from ceit_kernels.common import kept
from ceit_kernels.leff import choice, functional

pytestmark = pytest.mark.kernels(ttsem=False)

CASE = (2, 3, 4, 1, 8, 16, 8, 3)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Seconds of the implementations in the order in which they are timed: plain first, then triton and library."""
    seconds = []

    def timed(run):
        run()
        return seconds.pop(0)

    monkeypatch.delenv("CEIT_KERNELS_MEASURE", raising=False)
    monkeypatch.setenv("CEIT_KERNELS_TUNING_CACHE", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(measuring, "gpu_seconds", timed)
    monkeypatch.setattr(measuring, "has_clock", lambda x: True)
    monkeypatch.setattr(kept, "chip_name", lambda device: "a chip")
    monkeypatch.setattr(choice, "compute_capability", lambda device_index: 90)
    monkeypatch.setattr(backends, "choose", lambda *call: backends.Choice("triton", "the fastest that can run"))
    measuring._kept.forget()
    yield seconds
    measuring._kept.forget()


@pytest.fixture
def served(monkeypatch):
    """The backends that `auto` chose."""
    chosen, right = [], functional.choose
    monkeypatch.setattr(functional, "choose", lambda *call: chosen.append(right(*call)) or chosen[-1])
    return chosen


@pytest.mark.parametrize(
    ("seconds", "winner"), [((3, 2, 1), "library"), ((3, 1, 2), "triton"), ((1, 2, 3), "reference")]
)
def test_inference_goes_by_what_was_measured(clock, served, seconds, winner):
    leff, x, _, grid_size = make_call(CASE, torch.float64)
    clock += seconds
    leff.eval().requires_grad_(False)
    for _ in range(2):
        out = run("auto", leff, x, grid_size)
        torch.testing.assert_close(out, run("reference", leff, x, grid_size), rtol=1e-12, atol=1e-12)
    assert served == [winner] * 2
    assert not clock
    assert f"a chip: {winner} (triton" in str(ceit_kernels.status())


@pytest.mark.parametrize(("seconds", "winner"), [((3, 2, 1), "library"), ((1, 2, 3), "reference")])
def test_measuring_a_training_step_leaves_no_trace(clock, served, seconds, winner):
    leff, x, grad_out, grid_size = make_call(CASE, torch.float64, "bfb")
    clock += seconds
    state = torch.get_rng_state()
    plain = train_step("reference", copy.deepcopy(leff), x, grad_out, grid_size)
    measured = train_step("auto", copy.deepcopy(leff), x, grad_out, grid_size)
    torch.testing.assert_close(measured, plain, rtol=1e-10, atol=1e-10)
    assert served == [winner]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_call_that_cannot_be_measured_goes_by_its_width_and_the_chip(clock, monkeypatch):
    monkeypatch.setattr(measuring, "is_capturing", lambda: True)
    assert [choice._rule(channels, None) for channels in (192, 255, 256, 384)] == ["triton"] * 2 + ["library"] * 2
    for chip in (80, 86, 89, 90, 100, 120):
        monkeypatch.setattr(choice, "compute_capability", lambda device_index, chip=chip: chip)
        assert choice._rule(192, None) == "triton"
    monkeypatch.setattr(choice, "compute_capability", lambda device_index: 130)
    assert choice._rule(192, None) == "library"
