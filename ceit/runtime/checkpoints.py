"""What a training run leaves on disk, and how a run goes on from it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .options import TrainOptions, UsageError, flag, usage_errors

FORMAT = 1
LAST, BEST, OPTIONS, METRICS, RESULT = "last.pt", "best.pt", "options.json", "metrics.jsonl", "result.json"

# They change where a run computes and what with: its numbers by no more than rounding.
_FREE_OPTIONS = {"output", "resume", "device", "fused", "backend", "compile"}
_KEYS = {"format", "model", "optimizer", "epoch", "options", "classes", "history", "step_losses"}


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that at any moment, even if the machine fails, `path` is either the old file or the new one.

    Args:
        path: the file to make or replace.
        write: writes the contents to a binary file. If it raises, `path` stays as it was.
    """
    # One name for all attempts, so that what a killed process leaves is overwritten by the next.
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, contents: Any) -> None:
    """Write `contents` as indented JSON, atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(contents, indent=2) + "\n").encode()))


def write_metrics(path: Path, history: list[dict[str, float]]) -> None:
    """Write one line of JSON per epoch, atomically: epochs after the checkpoint that a run resumed from disappear."""
    lines = "".join(json.dumps(record) + "\n" for record in history)
    write_atomically(path, lambda file: file.write(lines.encode()))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and plain containers, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint_state(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of `ceit train`, running nothing that it contains.

    Raises:
        UsageError: the file is missing, damaged, or not one of ours.
    """
    if not Path(path).is_file():
        raise UsageError(f"checkpoint {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise UsageError(f"checkpoint {path} is damaged or no checkpoint ({type(error).__name__})") from error
    missing = _KEYS - set(state) if isinstance(state, dict) else _KEYS
    if missing:
        raise UsageError(f"checkpoint {path} is not one of `ceit train`, it lacks {', '.join(sorted(missing))}")
    if state["format"] != FORMAT:
        raise UsageError(f"checkpoint {path} has format {state['format']}, this version reads format {FORMAT}")
    return state


def find_checkpoint(options: TrainOptions) -> Path | None:
    """The checkpoint that `--resume` means, None if the run starts from scratch. Writes nothing.

    Raises:
        UsageError: the checkpoint is missing, or the output folder holds a run that this one would overwrite.
    """
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file, expected a folder")
    begun = any((output / name).exists() for name in (LAST, OPTIONS))
    if options.resume is None:
        if begun:
            raise UsageError(
                f"--output {output} already holds a run: add --resume to go on with it, or give another folder"
            )
        return None
    if options.resume == "auto":
        return output / LAST if (output / LAST).is_file() else None
    checkpoint = Path(options.resume)
    if not checkpoint.is_file():
        raise UsageError(f"--resume {checkpoint}: no such file")
    if begun and checkpoint.resolve().parent != output.resolve():
        raise UsageError(f"--output {output} already holds another run than --resume {checkpoint}: give another folder")
    return checkpoint


def check_same_options(saved: dict[str, Any], options: dict[str, Any], path: Path) -> None:
    """Check that a run would go on with the same numbers as the run that saved a checkpoint.

    Args:
        saved: the options in the checkpoint.
        options: the options now.
        path: the checkpoint, for the message.

    Raises:
        UsageError: naming every option that differs and changes the numbers.
    """
    free = _FREE_OPTIONS | ({"epochs"} if options["sched"] == "none" else set())
    names = [name for name in {**saved, **options} if name not in free and saved.get(name) != options.get(name)]
    if names:
        differences = "; ".join(f"{flag(name)} was {saved.get(name)}, is {options.get(name)}" for name in names)
        raise UsageError(f"cannot resume from {path} with other options: {differences}")


def create_output(options: TrainOptions, contents: dict[str, Any]) -> Path:
    """Make the output folder and write the options into it."""
    output = Path(options.output)
    with usage_errors(f"--output {output}"):
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / OPTIONS, contents)
    return output
