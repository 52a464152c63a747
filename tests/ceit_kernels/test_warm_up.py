"""Compiling ahead of the first step, for a GPU that is not there, and on one."""

import copy
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ceit import CeiT
from ceit_kernels import add_norm, backends, fuse, use_backend, warm_up
from ceit_kernels.backends import current_backend
from ceit_kernels.common import compile_ahead
from ceit_kernels.common.compile_ahead import compile_launches
from ceit_kernels.warm_up import launches_of

triton = pytest.importorskip("triton")
JITFunction = triton.runtime.JITFunction
SIZES = {"img_size": 48, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}


@pytest.fixture
def chip(monkeypatch, tmp_path):
    """A compiler for a GPU that is not there, with a cache of its own."""
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))


def keys(launches, monkeypatch):
    """What Triton would compile for launches: for each key it compiles once."""
    found = collect_keys(monkeypatch)
    compile_launches(launches, 1, lambda done, total: None)
    return found


def collect_keys(monkeypatch):
    """Receives the keys of what Triton would compile from now on."""
    found = set()

    def hook(*, key, fn, **others):
        found.add((fn.name, key))
        return True  # which compiles nothing

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    return found


@pytest.mark.parametrize("training", [True, False])
def test_kernels_do_not_depend_on_the_number_of_images(chip, monkeypatch, training):
    model = fuse(CeiT(**SIZES))
    first, *others = (
        keys(launches_of(model, (images, 3, 48, 48), torch.float32, training, 90), monkeypatch)
        for images in (1, 2, 7, 64, 100, 256)
    )
    assert len(first) > (12 if training else 2)
    assert others == [first] * 5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pipeline", ["triton", "library"])
def test_the_first_step_finds_all_of_its_kernels_and_no_other_was_compiled(chip, monkeypatch, pipeline, training):
    model = fuse(CeiT(**{**SIZES, "depth": 3})).train(training)
    monkeypatch.setattr(backends, "_INTERPRETING", True)  # or Triton would not take tensors on the CPU
    others = "add_norm=triton,attention=triton,lca=triton,i2t=reference,linear=reference"
    with use_backend(f"leff={pipeline},{others}"), torch.set_grad_enabled(training):
        compiled = keys(launches_of(model, (2, 3, 48, 48), torch.float32, training, 90), monkeypatch)
        used = collect_keys(monkeypatch)
        out = model(torch.randn(2, 3, 48, 48))
        if training:
            out.sum().backward()
    assert len(used) > (20 if training else 5)
    assert used == compiled


def test_kernels_are_compiled_once_and_it_is_told_how_far_it_is(chip, tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_norm, self.norm = fuse(add_norm.AddNorm()), nn.LayerNorm(32)

        def forward(self, x):
            return self.add_norm(x, x, self.norm)

    launches, told = [*launches_of(Model(), (2, 5, 32), torch.float16, True, 90)] * 2, []
    for launch in launches:
        launch.kernel.device_caches.clear()
    assert compile_launches(launches, 2, lambda *numbers: told.append(numbers)) == 2
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == 2
    assert compile_launches(launches, 2, lambda *numbers: None) == 0
    for launch in launches:
        launch.kernel.device_caches.clear()


@pytest.mark.parametrize(
    ("setting", "recorded"), [("auto", ["auto", "triton", "library"]), ("leff=library", ["library"])]
)
def test_every_pipeline_that_the_first_call_measures_is_compiled(monkeypatch, caplog, setting, recorded):
    module, asked = sys.modules[warm_up.__module__], []
    model = nn.Linear(1, 1)
    monkeypatch.setattr(model, "parameters", lambda: [SimpleNamespace(device=torch.device("cuda", 1))])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(module, "compute_capability", lambda index: 80 + index)

    def launches(*call):
        asked.append((*call, current_backend("leff")))
        return [len(asked)]

    monkeypatch.setattr(module, "launches_of", launches)
    monkeypatch.setattr(module, "compile_launches", lambda found, threads, progress: 10 * len(found) + threads)
    with use_backend(setting), caplog.at_level("INFO", "ceit_kernels"):
        count = warm_up(model, (2, 3), torch.float16, training=False, threads=4)
    assert asked == [(model, (2, 3), torch.float16, False, 81, backend) for backend in recorded]
    assert count == 10 * len(recorded) + 4
    assert f"{count} kernels of Linear are compiled" in caplog.text


def test_threads_parse_sources_in_turn(monkeypatch):
    """Several Pythons fail now and then where two threads parse at once."""
    at_once, most = [], []

    def parse(function):
        at_once.append(function)
        time.sleep(0.002)
        most.append(len(at_once))
        at_once.remove(function)

    monkeypatch.setattr(JITFunction, "parse", parse)
    with compile_ahead._parsing_in_turn(), ThreadPoolExecutor(4) as workers:
        for _ in workers.map(JITFunction.parse, range(8)):
            pass
    assert most == [1] * 8
    assert JITFunction.parse is parse


def test_recording_leaves_a_model_alone():
    model = fuse(CeiT(**SIZES, drop_path_rate=0.5)).eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.blocks[0].register_forward_hook(lambda *_: pytest.fail("it was called"))
    assert launches_of(model, (2, 3, 48, 48), torch.float32, True, 90)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert torch.equal(state, torch.get_rng_state())
    assert all(type(p) is nn.Parameter and p.grad is None for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_autocast_decides_what_is_recorded():
    model = fuse(CeiT(**SIZES))
    with torch.autocast("cpu", torch.bfloat16):
        cast = launches_of(model, (2, 3, 48, 48), torch.float32, True, 90)
    plain = launches_of(model, (2, 3, 48, 48), torch.float32, True, 90)
    found = [{str(launch.arguments.get("COMPUTE")) for launch in launches} for launches in (cast, plain)]
    assert "bf16" in found[0]
    assert "bf16" not in found[1]


def test_one_process_compiles_at_a_time(tmp_path):
    fcntl, folder = pytest.importorskip("fcntl"), tmp_path / "a new one" / "cache"

    def lock():
        with open(folder / "ceit_kernels.lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    for _ in range(2):
        with compile_ahead._alone(folder), pytest.raises(BlockingIOError):
            lock()
        lock()


def test_on_a_cpu_there_is_nothing_to_compile():
    assert warm_up(fuse(CeiT(**SIZES)), (2, 3, 48, 48)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_on_a_gpu_the_first_steps_compile_nothing(monkeypatch, training):
    monkeypatch.setenv("CEIT_KERNELS_MEASURE", "0")
    model = fuse(CeiT(**SIZES)).cuda().train(training)
    with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(training):
        warm_up(model, (64, 3, 48, 48), training=training)
        missed = []
        monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda *, fn, **_: missed.append(fn.name))
        for images in (64, 7):
            out = model(torch.randn(images, 3, 48, 48, device="cuda"))
            if training:
                out.sum().backward()
    assert missed == []
