"""The kernels by themselves on the host, under several schedules, sanitizers, and with a barrier taken away."""

import re
import shutil
import subprocess

import pytest
from support.host_kernels import CSRC, compile_on_host

DEVICE_CODE = ("forward.h", "backward.h", "image_gradient.h")

SOURCE = "run_stem.cpp"


def run(program, schedules=6):
    return subprocess.run([program, str(schedules)], capture_output=True, text=True, check=False)


def test_every_schedule_gives_the_same_bits():
    done = run(compile_on_host(SOURCE, "-O1"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.prove
def test_address_and_undefined_behaviour_sanitizers_find_nothing():
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    done = run(compile_on_host(SOURCE, *flags), schedules=1)
    assert done.returncode == 0, done.stdout + done.stderr


def barriers():
    for name in DEVICE_CODE:
        text = (CSRC / "cuda" / "i2t" / name).read_text()
        yield from ((name, i) for i, _ in enumerate(re.finditer(r"^ *barrier\(\);\n", text, re.MULTILINE)))


# One always; every one with the exhaustive proofs.
FEW = {("backward.h", 1)}


@pytest.mark.parametrize(
    ("name", "which"), [pytest.param(*b, marks=[] if b in FEW else pytest.mark.prove) for b in barriers()]
)
def test_a_missing_barrier_is_caught(tmp_path, name, which):
    sources = tmp_path / "csrc"
    shutil.copytree(CSRC, sources)
    path = sources / "cuda" / "i2t" / name
    text = path.read_text()
    start, end = [match.span() for match in re.finditer(r"^ *barrier\(\);\n", text, re.MULTILINE)][which]
    path.write_text(text[:start] + text[end:])
    program = compile_on_host(SOURCE, "-O1", csrc=sources)
    assert run(program, schedules=3).returncode != 0
