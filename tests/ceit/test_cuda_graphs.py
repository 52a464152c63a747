"""`--cuda-graphs`, with a GPU that is not there, and on one."""

import sys

import pytest
import torch
from support.fake_graphs import FakeGraphs

from ceit import train as training
from ceit.evaluate import evaluate_checkpoint
from ceit.predict import predict
from ceit.runtime import machine, steps
from ceit.runtime.checkpoints import load_checkpoint_state
from ceit.runtime.errors import UsageError
from ceit.runtime.options import EvaluateOptions, PredictOptions
from ceit.train import train
from ceit_kernels import use_backend


@pytest.fixture
def fake(monkeypatch):
    """Graphs of tensors on the CPU."""
    for module in ("ceit.runtime.setup", "ceit.evaluate", "ceit.predict"):
        monkeypatch.setattr(f"{module}.check_graphs", lambda device: None)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    monkeypatch.setattr(training, "_draw", lambda *_: None)
    with use_backend("reference"):
        yield FakeGraphs(monkeypatch)


def weights(folder):
    state = load_checkpoint_state(folder / "last.pt")
    return [*state["model"].values(), *state.get("model_ema", {}).values()]


def run(options, folder, cuda_graphs, **changes):
    return torch.tensor(train(options(output=str(folder), cuda_graphs=cuda_graphs, **changes)).step_losses)


SETTINGS = {
    "adamw": {"mixup": 0.4, "ema": True, "clip_grad": 1.0, "lr": 3e-3, "layer_decay": 0.9},
    "adamw, accumulated": {"accumulate": 3, "batch_size": 6, "amp": "bfloat16", "epochs": 4},
    "sgd": {"opt": "sgd", "accumulate": 2, "drop_path": 0.5},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_run_has_the_numbers_that_it_has_without_graphs(fake, options, tmp_path, monkeypatch, settings):
    settings = {"epochs": 3, **settings}
    found = run(options, tmp_path / "graphs", True, **settings)
    captured, replayed = fake.captured, fake.replayed
    assert captured > 0
    assert replayed > 3
    if "opt" in settings:
        expected = run(options, tmp_path / "plain", False, **settings)
    else:  # AdamW's corrections are computed on the GPU, and round otherwise
        monkeypatch.setattr(steps, "_FIRST_STEPS", 1000)
        expected = run(options, tmp_path / "plain", True, **settings)
    assert (fake.captured, fake.replayed) == (captured, replayed)
    groups = load_checkpoint_state(tmp_path / "graphs" / "last.pt")["optimizer"]["param_groups"]
    assert all(bool(group.get("capturable")) == ("opt" not in settings) for group in groups)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, weights(tmp_path / "graphs"), weights(tmp_path / "plain")))


def test_a_run_is_resumed_with_and_without_graphs(fake, options, tmp_path):
    expected = run(options, tmp_path / "whole", True, epochs=3, sched="none")
    for epoch, graphs in enumerate((True, True, False), 1):
        found = run(options, tmp_path / "parts", graphs, epochs=epoch, sched="none", resume="auto")
        saved = load_checkpoint_state(tmp_path / "parts" / "last.pt")
        assert all(type(group["lr"]) is float for group in saved["optimizer"]["param_groups"])
        if graphs:
            assert torch.equal(found, expected[: len(found)])
    torch.testing.assert_close(found, expected)
    again = run(options, tmp_path / "parts", True, epochs=4, sched="none", resume="auto")
    torch.testing.assert_close(again[: len(found)], found)


def test_evaluation_and_prediction_replay_graphs(fake, options, tmp_path):
    trained = options(epochs=1)
    train(trained)
    checkpoint = str(tmp_path / "run" / "last.pt")
    for fused in (False, True):
        about = {"checkpoint": checkpoint, "fused": fused, "device": "cpu", "batch_size": 3}
        found, expected = (
            evaluate_checkpoint(EvaluateOptions(data=trained.data, workers=0, cuda_graphs=graphs, **about))
            for graphs in (True, False)
        )
        assert found == expected
        found, expected = (
            predict(PredictOptions(images=[trained.data], cuda_graphs=g, **about)) for g in (True, False)
        )
        assert [p.classes for p in found] == [p.classes for p in expected]
    assert fake.captured == 4
    assert fake.replayed > 8


@pytest.mark.parametrize("option", ["fsdp", "sync_bn", "grad_checkpointing"])
def test_options_that_no_graph_holds_are_refused(options, option):
    with pytest.raises(UsageError, match=f"--cuda-graphs and --{option.replace('_', '-')}: .*give one of the two"):
        train(options(cuda_graphs=True, **{option: True}))


def test_without_a_gpu_graphs_are_refused(options, tmp_path):
    with pytest.raises(UsageError, match="--cuda-graphs needs a CUDA GPU, and the device is cpu"):
        train(options(cuda_graphs=True))
    train(options(epochs=1))
    about = {"checkpoint": str(tmp_path / "run" / "last.pt"), "cuda_graphs": True, "device": "cpu"}
    with pytest.raises(UsageError, match="--cuda-graphs needs a CUDA GPU"):
        evaluate_checkpoint(EvaluateOptions(data=options().data, **about))
    with pytest.raises(UsageError, match="--cuda-graphs needs a CUDA GPU"):
        predict(PredictOptions(images=[options().data], **about))


def test_a_compiled_model_captures_graphs_by_itself(fake, options, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, **chosen: modes.append(chosen) or model)
    train(options(epochs=1, compile=True, cuda_graphs=True))
    assert (modes, fake.captured) == ([{"mode": "reduce-overhead"}], 0)


def test_kernels_are_compiled_ahead_for_training_and_evaluation(monkeypatch, caplog):
    calls = []

    def warm_up(model, shape, training, progress):
        calls.append((shape, training))
        progress(1, 2)
        if training:
            raise RuntimeError("no compiler")

    monkeypatch.setattr("ceit_kernels.warm_up", warm_up)
    machine.compile_kernels(torch.nn.Identity(), (8, 3, 32, 32), "none", visible=False)
    assert calls == [((8, 3, 32, 32), True), ((8, 3, 32, 32), False)]
    assert caplog.messages == ["kernels are compiled at their first launch: no compiler"]


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["none", "bfloat16", "float16"])
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_a_run_has_the_losses_that_it_has_without_graphs(options, tmp_path, amp, compile):
    settings = {"epochs": 3, "device": "cuda", "fused": True, "amp": amp, "ema": True, "mixup": 0.4, "compile": compile}
    found, expected = (run(options, tmp_path / str(graphs), graphs, **settings) for graphs in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-3 if amp == "none" else 0.05, atol=1e-3)
