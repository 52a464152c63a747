import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ceit
from ceit.evaluate import evaluate_checkpoint
from ceit.runtime import distributed
from ceit.runtime.options import EvaluateOptions

_CHILD = """
import os, sys, torch
import ceit.train as training
from ceit.__main__ import main

summarize, evaluate = training._summarize, training.evaluate
folder, rank = sys.argv.pop(), os.environ["RANK"]

def evaluate_and_count(*arguments):
    metrics = evaluate(*arguments)
    print(f"rank {rank} counted {metrics.images} images", flush=True)
    return metrics

def save_and_summarize(run, *others):
    weights = {"model": run.model.state_dict(), "ema": run.ema.module.state_dict()}
    torch.save({"losses": run.step_losses, **weights}, f"{folder}/rank{rank}.pt")
    return summarize(run, *others)

training.evaluate, training._summarize = evaluate_and_count, save_and_summarize
sys.exit(main())
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_train_and_evaluate_one_model_and_count_every_image_once(options, arguments_of, tmp_path):
    settings = options(ema=True, accumulate=3, batch_size=4, fused=True)
    script = tmp_path / "child.py"
    script.write_text(_CHILD)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(script), *arguments_of(settings), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(ceit.__file__).parents[1])}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stderr
    for rank in (0, 1):
        assert process.stdout.count(f"rank {rank} counted 13 images") == 2
    assert process.stderr.count("epoch 2/2: train loss") == 1, "only one process logs"

    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["losses"] == second["losses"]
    assert len(first["losses"]) == 2 * (17 // 4)
    for kind in ("model", "ema"):
        assert all(torch.equal(tensor, second[kind][name]) for name, tensor in first[kind].items())

    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["processes"] == 2
    path = f"{settings.output}/last.pt"
    alone = evaluate_checkpoint(
        EvaluateOptions(data=settings.data, checkpoint=path, ema=True, workers=0, device="cpu", fused=True)
    )
    assert result["accuracy"] == pytest.approx(alone.top1)

    words = ["evaluate", "--data", settings.data, "--checkpoint", path, "--ema", "--fused", "--device", "cpu"]
    command = [*torchrun, "-m", "ceit", *words, "--workers", "0"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [
        f"top-1 {alone.top1:.2f}%  top-5 {alone.top5:.2f}%  loss {alone.loss:.4f}  13 images"
    ], "one process tells the figures of both"


JOB = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "gpu[07-09,12],login1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (JOB, ("gpu07", "23456")),
        (JOB | {"SLURM_STEP_NODELIST": "gpu12"}, ("gpu12", "23456")),
        (JOB | {"MASTER_ADDR": "here", "MASTER_PORT": "1"}, ("here", "1")),
        (JOB | {"SLURM_NTASKS": "1"}, (None, None)),
        (JOB | {"WORLD_SIZE": "2"}, (None, None)),
        ({name: JOB[name] for name in JOB if name != "SLURM_PROCID"}, (None, None)),
        ({"SLURM_PROCID": "0"}, (None, None)),
    ],
)
def test_processes_of_srun_meet_at_the_first_node_and_others_are_left_alone(environment, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(environment))
    distributed._prepare_slurm()
    assert (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")) == expected
