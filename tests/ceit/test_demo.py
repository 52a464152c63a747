import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from ceit.__main__ import main
from ceit.demo import EARLY_LIMITS, EPOCH_LIMIT, DemoFailed, DemoOptions, compare, demo, judge, training_command
from ceit.runtime.errors import UsageError
from ceit_kernels.operators import OPERATORS

SMALL = ["--epochs", "2", "--img-size", "32", "--model-kwargs", "depth=2", "embed_dim=32", "num_heads=2"]


def result(losses, accuracy=99.0, epochs=2, **fused_operators):
    return {
        "accuracy": accuracy,
        "images_per_second": 100.0,
        "peak_memory_mb": 500.0,
        "device": "cpu",
        "epochs": epochs,
        "fused_operators": fused_operators,
        "step_losses": losses,
    }


def test_the_demo_trains_twice_replaces_its_earlier_runs_and_saves_the_comparison(tmp_path, capfd):
    output = tmp_path / "demo"
    for kind in ("plain", "fused"):
        (output / kind).mkdir(parents=True)
        for name in ("options.json", "last.pt", "old.txt"):
            (output / kind / name).write_text("{}")
    (output / "notes.txt").write_text("mine")
    arguments = ["demo", *SMALL, "--device", "cpu", "--output", str(output), "--minimum-accuracy", "0"]
    assert main(arguments) == 0
    printed = capfd.readouterr()
    for kind, flag in (("plain", "--no-fused"), ("fused", "--fused")):
        command = next(line for line in printed.out.splitlines() if f"{output / kind} " in line)
        assert command.split()[:4] == ["python", "-m", "ceit", "train"]
        assert flag in command.split()
        assert not (output / kind / "old.txt").exists()
    assert "images/s, loss" in printed.err, "the children's progress bars are seen"
    for cell in ("test accuracy", "images/s", "peak memory", "what ran", "largest difference of the losses"):
        assert cell in printed.out
    assert "fell back on plain PyTorch" not in printed.out
    comparison = json.loads((output / "comparison.json").read_text())
    assert comparison["plain"]["fused_operators"] == {}
    operators = comparison["fused"]["fused_operators"]
    assert set(operators) == set(OPERATORS)
    assert {by["backend"] for by in operators.values()} == {"native"}
    assert comparison["early_loss_difference"] <= comparison["largest_loss_difference"] < 0.1
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "notes.txt").read_text() == "mine"


def test_a_missed_accuracy_fails_the_demo_with_status_1(tmp_path, capfd, monkeypatch):
    from ceit import demo as module

    def finish(kind, command):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(result([1.0, 0.5], accuracy=98.4, epochs=1)))
        record = {"epoch": 1, "test_accuracy": 98.4}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")

    monkeypatch.setattr(module, "_run", finish)
    assert main(["demo", "--output", str(tmp_path)]) == 1
    assert capfd.readouterr().err.strip() == "error: the plain run reached 98.40% test accuracy, expected 98.5%"
    assert (tmp_path / "comparison.png").exists(), "what there is to see is saved before it fails"


@pytest.mark.parametrize(
    ("plain", "fused", "message"),
    [
        ([1.0] * 80, [1.0] * 80, None),
        ([1.0] * 80, [1.0] * 60 + [1.0 + 5 * EPOCH_LIMIT] + [1.0] * 19, None),
        ([1.0] * 80, [1.0 + 2 * EARLY_LIMITS["cpu"]] + [1.0] * 79, "in the first 20 steps, expected at most 1e-05"),
        ([1.0] * 80, [1.0] * 19 + [1.0 + 2 * EARLY_LIMITS["cpu"]] + [1.0] * 60, "in the first 20 steps"),
        ([1.0] * 80, [1.0] * 20 + [1.0 + 2 * EARLY_LIMITS["cpu"]] + [1.0] * 59, None),
        ([1.0] * 80, [1.0] * 40 + [1.0 + 2 * EPOCH_LIMIT] * 40, "in the mean of an epoch, expected at most 0.1"),
    ],
    ids=["equal", "one step far on", "early", "the last early one", "no longer early", "epoch"],
)
def test_losses_may_drift_as_rounding_makes_them_and_no_further(plain, fused, message):
    comparison = compare({"plain": result(plain), "fused": result(fused)})
    with nullcontext() if message is None else pytest.raises(DemoFailed, match=message):
        judge(comparison, 99.0)


def test_on_a_gpu_the_first_losses_may_differ_by_what_tf32_makes_of_them():
    comparison = compare({"plain": result([1.0, 1.0]), "fused": result([1.0005, 1.0])})
    comparison["plain"]["device"] = "cuda:1"
    judge(comparison, 98.5)
    comparison["early_loss_difference"] = 1.1e-3
    with pytest.raises(DemoFailed, match=r"by 0\.0011 in the first 20 steps, expected at most 0\.001"):
        judge(comparison, 98.5)


def test_runs_of_different_length_are_no_comparison():
    with pytest.raises(DemoFailed, match="the plain run has 2 steps, the fused run 1"):
        compare({"plain": result([1.0, 1.0]), "fused": result([1.0])})


def test_both_runs_have_the_seed():
    for kind in ("plain", "fused"):
        command = " ".join(training_command(DemoOptions(seed=7), kind, Path("runs")))
        assert "--seed 7 " in command


def test_a_run_that_fails_fails_the_demo(tmp_path):
    options = DemoOptions(output=str(tmp_path), model_kwargs={"colour": "red"}, device="cpu")
    with pytest.raises(DemoFailed, match="the plain run ended with exit status 2"):
        demo(options)


def test_folders_that_are_no_runs_are_left_alone(tmp_path):
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"fused holds something else than a run of the demo"):
        demo(DemoOptions(output=str(tmp_path)))
    assert (tmp_path / "fused" / "thesis.txt").read_text() == "mine"


def test_the_table_says_what_ran():
    from io import StringIO

    from rich.console import Console

    from ceit.runtime.tables import show_comparison

    fused = {
        "lca": {"backend": "triton", "reason": "the fastest that can run"},
        "leff": {"backend": "reference", "reason": "no other implementation yet"},
    }
    comparison = compare({"plain": result([1.0, 1.0]), "fused": result([1.0, 1.0], **fused)})
    text = StringIO()
    show_comparison(comparison, Console(file=text, width=100))
    words = text.getvalue().split()
    for word, count in (("99.00%", 2), ("100", 2), ("500", 2), ("process", 1), ("tensors", 0), ("epochs", 1)):
        assert words.count(word) == count, word
    assert "lca: triton" in text.getvalue()
    assert "leff: PyTorch" in text.getvalue()
    assert "leff: no other implementation yet" in text.getvalue()
    assert "lca: the fastest" not in text.getvalue()
