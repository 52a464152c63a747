"""LeFF's kernels where their blocks are tuned."""

import copy
import json

import pytest
import torch
from support.leff import make_leff, make_tokens, make_training_leff, run, train_step

from ceit_kernels.common import kept, tuning
from ceit_kernels.common.tuning import Tiles, autotune
from ceit_kernels.leff.triton import launch_backward

pytestmark = pytest.mark.kernels(ttsem=False)


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Of two candidates, the table's and one of half the rows, the latter is timed last and comes out faster."""
    runs = []

    def seconds(run):
        run()
        runs.append(run)
        return -len(runs)

    def candidates(table):
        rows = next(iter(table.sizes))
        return [table, Tiles({**table.sizes, rows: table.sizes[rows] // 2}, table.num_warps, table.num_stages)]

    monkeypatch.setenv("CEIT_KERNELS_TUNING_CACHE", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(tuning, "has_clock", lambda x: True)
    monkeypatch.setattr(kept, "chip_name", str)
    monkeypatch.setattr(tuning, "gpu_seconds", seconds)
    monkeypatch.setattr(tuning, "_candidates", candidates)
    tuning._kept.forget()
    yield runs
    tuning._kept.forget()


def tuned_kernels():
    return {key.split("|")[0] for key in json.loads(kept.cache_path().read_text())}


@pytest.mark.parametrize("factored", [False, True])
def test_timing_leaves_results_gradients_and_running_statistics_those_of_one_step(timed, monkeypatch, factored):
    if factored:
        monkeypatch.setattr(launch_backward, "_is_factored", lambda dtype: True)
    leff = make_training_leff(8, 16, 8, 3, torch.float64)
    x, grad_out = (make_tokens(2, 13, 8, torch.float64, seed=seed) for seed in (0, 1))
    plain = train_step("reference", copy.deepcopy(leff), x, grad_out, (3, 4))
    with autotune():
        first = train_step("triton", copy.deepcopy(leff), x, grad_out, (3, 4))
        count = len(timed)
        again = train_step("triton", copy.deepcopy(leff), x, grad_out, (3, 4))
    assert count == len(timed) > 0
    torch.testing.assert_close(first, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    parts = {"expand_moments", "contract_operand", "hidden_gradient", "weight_gradient"}
    parts |= {"factored_product", "factored_gradient"} if factored else set()
    assert tuned_kernels() == {f"leff_{part}" for part in parts}


def test_inference_is_tuned_too(timed):
    leff, x = make_leff(8, 16, 8, 3, torch.float64), make_tokens(2, 13, 8, torch.float64)
    with autotune():
        fused = run("triton", leff, x, (3, 4), x)
    torch.testing.assert_close(fused, run("reference", leff, x, (3, 4), x), rtol=1e-12, atol=1e-12)
    assert tuned_kernels() == {"leff_expand", "leff_contract"}
