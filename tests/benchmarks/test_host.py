"""The time of the host, measured with kernels that do nothing."""

import json
import subprocess
import sys
from pathlib import Path


def test_the_host_is_timed_without_a_gpu():
    command = [sys.executable, "-m", "benchmarks.host", "--repetitions", "2", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    figures = json.loads(found.stdout)
    assert {name: figure["launches"] for name, figure in figures.items()} == {
        "LeFF training step": 12,
        "LeFF inference": 2,
        "add_norm training step": 2,
    }
    assert all(figure["us"] > 0 for figure in figures.values())
