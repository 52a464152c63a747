"""Training with sharded weights, and in processes that SLURM started: the numbers of DDP under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ceit
from ceit.evaluate import evaluate_checkpoint
from ceit.runtime.checkpoints import load_checkpoint_state
from ceit.runtime.distributed import first_node
from ceit.runtime.options import EvaluateOptions

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def launch(arguments_of):
    def start(settings, **environment):
        launcher = [] if environment else TORCHRUN
        command = [sys.executable, *launcher, "-m", "ceit", *arguments_of(settings)]
        everything = {**os.environ, "PYTHONPATH": str(Path(ceit.__file__).parents[1]), **environment}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=everything)

    return start


def finish(*processes):
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def losses_of(settings):
    return torch.tensor(json.loads((Path(settings.output) / "result.json").read_text())["step_losses"])


@pytest.mark.prove
@pytest.mark.parametrize(("fused", "sync_bn"), [(False, False), (True, True)])
def test_sharded_training_gives_the_numbers_of_ddp_and_goes_on_exactly(options, launch, tmp_path, fused, sync_bn):
    common = {
        "batch_size": 4,
        "accumulate": 2,
        "ema": True,
        "clip_grad": 1.0,
        "fused": fused,
        "sync_bn": sync_bn,
        "sched": "none",
        "lr": 1e-3,
    }
    ddp, sharded, short = (
        options(output=str(tmp_path / name), fsdp=name != "ddp", **common) for name in ("ddp", "fsdp", "short")
    )
    finish(launch(ddp))
    finish(launch(sharded))
    torch.testing.assert_close(losses_of(sharded), losses_of(ddp), rtol=1e-4, atol=1e-5)
    states = [load_checkpoint_state(Path(run.output) / "last.pt") for run in (ddp, sharded)]
    for kind in ("model", "model_ema"):
        assert states[0][kind].keys() == states[1][kind].keys()
        # Of separate running statistics DDP has those of the first process, FSDP2 the mean over the processes.
        found, expected = (
            {n: t for n, t in s[kind].items() if sync_bn or "running" not in n} for s in (states[1], states[0])
        )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    finish(launch(options(output=short.output, fsdp=True, epochs=1, **common)))
    finish(launch(options(output=short.output, fsdp=True, resume="auto", **common)))
    assert torch.equal(losses_of(short), losses_of(sharded))
    evaluated = EvaluateOptions(data=ddp.data, checkpoint=f"{short.output}/best.pt", ema=True, workers=0, device="cpu")
    result = json.loads((Path(short.output) / "result.json").read_text())
    assert evaluate_checkpoint(evaluated).top1 == pytest.approx(result["best_accuracy"])


def test_processes_of_slurm_find_each_other_and_share_weights_and_statistics(options, launch, tmp_path):
    settings = options(batch_size=4, epochs=1, fused=True, fsdp=True, sync_bn=True)
    job = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    finish(*(launch(settings, **job, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in (0, 1)))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["processes"] == 2


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a1,a2", "a1"),
        ("n[3]-ib,n4", "n3-ib"),
        ("rack-2.site.org", "rack-2.site.org"),
    ],
)
def test_the_first_of_slurms_nodes_is_where_processes_meet(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.prove
def test_two_processes_refuse_a_folder_in_use_together(options, launch, tmp_path):
    from ceit.runtime.files import claimed

    with claimed(tmp_path / "run"):
        process = launch(options(batch_size=4))
        _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "is in use by another run: give another folder" in errors
    assert not (tmp_path / "run" / "options.json").exists()
