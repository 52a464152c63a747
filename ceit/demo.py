"""The demonstration: the same training twice, with plain and with fused operators, side by side."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from .runtime import checkpoints
from .runtime.errors import UsageError
from .runtime.fields import check, option
from .runtime.files import write_json

KINDS = ("plain", "fused")

# Both runs start from the same weights and see the same batches. In float32 the losses of their first 20 steps were
# measured to differ by 1.2e-6 at most; a softmax with a wrong scale in one layer made that 2.1e-5. On a GPU PyTorch's
# convolutions round to TF32: weights rounded as coarsely made it 1e-4. Training multiplies any difference: rounding
# alone drew the losses of single steps 0.14 apart, the means of an epoch 0.016.
EARLY_STEPS = 20
EARLY_LIMITS = {"cpu": 1e-5, "cuda": 1e-3}
EPOCH_LIMIT = 0.1


class DemoFailed(RuntimeError):
    """A run failed, missed the accuracy, or the two do not agree; the message is one line for the user."""


@dataclasses.dataclass(kw_only=True)
class DemoOptions:
    """Options of `demo`."""

    epochs: int = option(8, "passes over the training images", group="demo", at_least=2)
    model_kwargs: Mapping[str, Any] = option({"depth": 6}, "arguments of the model", group="demo", key_values=True)
    img_size: int = option(64, "side of the images in pixels", group="demo", at_least=1)
    seed: int = option(0, "seed of both runs", group="demo", at_least=0, at_most=2**32 - 1)
    device: str = option("auto", "cpu, cuda or cuda:N; auto takes a GPU if there is one", group="demo")
    minimum_accuracy: float = option(
        98.5, "test accuracy in percent that both runs must reach", group="demo", at_least=0
    )
    output: str = option("runs/demo", "folder of the runs and of the comparison", group="demo", metavar="DIR")


def demo(options: DemoOptions) -> None:
    """Train on the digits with plain and with fused operators, compare, and save the comparison.

    Writes `comparison.json` and `comparison.png` to `options.output`, and the runs to the folders plain/ and fused/ in
    it, whose earlier contents are removed.

    Raises:
        UsageError: an option cannot be used, or a package is missing.
        DemoFailed: a run failed or missed the accuracy, or the losses of the two differ by more than rounding explains.
    """
    check(options)
    try:
        from .runtime.plots import draw_comparison
        from .runtime.tables import show_comparison
    except ImportError as error:
        raise UsageError(f"the demo needs {error.name}: pip install 'ceit-kernels[demo]'") from error
    output = Path(options.output)
    runs = {kind: output / kind for kind in KINDS}
    for folder in runs.values():
        _remove_run(folder)
    for kind, folder in runs.items():
        _run(kind, training_command(options, kind, folder))

    results = {kind: json.loads((folder / checkpoints.RESULT).read_text()) for kind, folder in runs.items()}
    histories = {kind: _read_lines(folder / checkpoints.METRICS) for kind, folder in runs.items()}
    comparison = compare(results)
    write_json(output / "comparison.json", comparison)
    draw_comparison(results, histories, output / "comparison.png")
    show_comparison(comparison)
    print(f"saved {output / 'comparison.json'} and {output / 'comparison.png'}")
    judge(comparison, options.minimum_accuracy)


def training_command(options: DemoOptions, kind: str, folder: Path) -> list[str]:
    """The command of one of the two runs, as a user would give it."""
    recipe = (
        f"--model ceit_tiny_patch16_224 --img-size {options.img_size} --epochs {options.epochs} --warmup-epochs 1 "
        f"--batch-size 32 --lr 1e-3 --drop-path 0 --workers 0 --seed {options.seed} --device {options.device}"
    )
    model_kwargs = [f"{name}={value}" for name, value in options.model_kwargs.items()]
    fused = "--fused" if kind == "fused" else "--no-fused"
    words = ["train", "--data", "digits", *recipe.split(), fused, "--output", str(folder)]
    return ["python", "-m", "ceit", *words, *(["--model-kwargs", *model_kwargs] if model_kwargs else [])]


def compare(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the two runs came to, and how far their losses are apart.

    Args:
        results: contents of `result.json` by kind.

    Returns:
        The results without the losses of each step, by kind, and the largest differences of the losses: of a step, of
        one of the first `EARLY_STEPS` steps, and of the mean of an epoch.

    Raises:
        DemoFailed: the runs have different numbers of steps.
    """
    plain, fused = (results[kind]["step_losses"] for kind in KINDS)
    if len(plain) != len(fused):
        raise DemoFailed(f"the plain run has {len(plain)} steps, the fused run {len(fused)}")
    differences = [abs(a - b) for a, b in zip(plain, fused, strict=True)]
    per_epoch = len(differences) // results["plain"]["epochs"]
    epochs = range(0, len(differences), per_epoch)
    means = [abs(fmean(plain[i : i + per_epoch]) - fmean(fused[i : i + per_epoch])) for i in epochs]
    shortened = {
        kind: {name: value for name, value in result.items() if name != "step_losses"}
        for kind, result in results.items()
    }
    return {
        **shortened,
        "largest_loss_difference": max(differences),
        "early_loss_difference": max(differences[:EARLY_STEPS]),
        "epoch_loss_difference": max(means),
    }


def judge(comparison: dict[str, Any], minimum_accuracy: float) -> None:
    """Raise `DemoFailed` unless both runs reach the accuracy and their losses agree."""
    for kind in KINDS:
        accuracy = comparison[kind]["accuracy"]
        if accuracy < minimum_accuracy:
            raise DemoFailed(f"the {kind} run reached {accuracy:.2f}% test accuracy, expected {minimum_accuracy:g}%")
    early_limit = EARLY_LIMITS[comparison["plain"]["device"].split(":")[0]]
    for name, limit, what in (
        ("early_loss_difference", early_limit, f"by {{:.2g}} in the first {EARLY_STEPS} steps"),
        ("epoch_loss_difference", EPOCH_LIMIT, "by {:.2g} in the mean of an epoch"),
    ):
        if comparison[name] > limit:
            raise DemoFailed(
                "the losses of the plain and the fused run differ by more than rounding explains: "
                f"{what.format(comparison[name])}, expected at most {limit:g}"
            )


def _run(kind: str, command: list[str]) -> None:
    print(f"\n{kind} operators:\n  {shlex.join(command)}", flush=True)
    status = subprocess.run([sys.executable, *command[1:]], check=False).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise DemoFailed(f"the {kind} run ended with exit status {status}")


def _remove_run(folder: Path) -> None:
    """Remove an earlier run, and nothing that is not one."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / checkpoints.OPTIONS).is_file():
        raise UsageError(f"--output: {folder} holds something else than a run of the demo")
    shutil.rmtree(folder, ignore_errors=True)


def _read_lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
