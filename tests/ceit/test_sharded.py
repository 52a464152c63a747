"""Models in two processes, under DDP, FSDP and FSDP2: the numbers of a plain model whose gradients are averaged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import sharded

import ceit

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each of two processes found out about every way of sharding, in one start of them."""
    path = tmp_path_factory.mktemp("sharded") / "outcomes.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(ceit.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, sharded.__file__, str(path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert process.returncode == 0, process.stderr
    return [json.loads(path.with_suffix(f".{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("way", "kind"),
    [
        (f"{way}{name}", kind)
        for name, (_, ways) in sharded.MEASURES.items()
        for way in ways
        for kind in sharded.KINDS[way]
    ],
)
def test_a_sharded_model_trains_and_evaluates_to_the_plain_numbers(outcomes, way, kind, rank):
    outcome = outcomes[rank][f"{way}, {kind}"]
    assert isinstance(outcome, float), outcome
    assert outcome < 1e-12
