"""What a training run leaves on disk, and how a run goes on from it."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import read_checkpoint
from .errors import UsageError
from .fields import flag, plain
from .files import write_atomically
from .options import TrainOptions

FORMAT = 1
LAST, BEST, OPTIONS, RESULT = "last.pt", "best.pt", "options.json", "result.json"
METRICS, METRICS_CSV, CURVES = "metrics.jsonl", "metrics.csv", "curves.png"

# They change where a run computes and what with: its numbers by no more than rounding, or what workers draw.
_FREE_OPTIONS = {"output", "resume", "device", "fused", "backend", "compile", "cuda_graphs", "workers"}
_PER_UPDATE = ("batch_size", "accumulate")
_KEYS = {
    "format": int,
    "model": dict,
    "optimizer": dict,
    "epoch": int,
    "updates": int,
    "options": dict,
    "classes": list,
    "history": list,
    "step_losses": Tensor,
}


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and plain containers, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint_state(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of `ceit train`, running nothing that it contains.

    Raises:
        UsageError: the file is missing, damaged, or not one of ours.
    """
    try:
        state = read_checkpoint(Path(path))
    except FileNotFoundError as error:
        raise UsageError(f"checkpoint {path} does not exist") from error
    except (OSError, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    found = state if isinstance(state, dict) else {}
    if isinstance(found.get("format"), int) and found["format"] != FORMAT:
        raise UsageError(f"checkpoint {path} has format {found['format']}, this version reads format {FORMAT}")
    missing = sorted(name for name, kind in _KEYS.items() if not isinstance(found.get(name), kind))
    if missing:
        raise UsageError(f"checkpoint {path} is not one of `ceit train`, it lacks {', '.join(missing)}")
    return state


def load_state_to_resume(path: Path) -> dict[str, Any]:
    """As `load_checkpoint_state`; the error says how to start from the weights of another's checkpoint."""
    try:
        return load_checkpoint_state(path)
    except UsageError as error:
        raise UsageError(
            f"{error}; to start a run from its weights, give --checkpoint {path} without --resume"
        ) from error


def find_checkpoint(options: TrainOptions) -> Path | None:
    """The checkpoint that `--resume` means, None if the run starts from scratch. Writes nothing.

    Raises:
        UsageError: the checkpoint is missing, or the output folder holds a run that this one would overwrite.
    """
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file, expected a folder")
    if (output / LAST).is_dir():
        raise UsageError(f"--output {output}: {LAST} in it is a folder, expected a checkpoint")
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
    if not checkpoint.exists():
        raise UsageError(f"--resume {checkpoint}: no such file")
    if begun and checkpoint.resolve().parent != output.resolve():
        raise UsageError(f"--output {output} already holds another run than --resume {checkpoint}: give another folder")
    return checkpoint


def check_same_options(saved: dict[str, Any], options: dict[str, Any], path: Path) -> None:
    """Check that a run would go on with the same numbers as the run that saved a checkpoint.

    More epochs go on by the longer schedule. Another number of processes is allowed where an update sees as many
    images as before.

    Args:
        saved: the options in the checkpoint.
        options: the options now.
        path: the checkpoint, for the message.

    Raises:
        UsageError: naming every option that differs and changes the numbers.
    """
    free = set(_FREE_OPTIONS)
    if options["epochs"] >= saved.get("epochs", 0) or options["sched"] == "none":
        free.add("epochs")
    if options["world_size"] != saved.get("world_size") and _images_per_update(options) == _images_per_update(saved):
        free |= {"world_size", *_PER_UPDATE}
    before = {**plain(TrainOptions()), **saved}  # a run of an earlier version did without what is new
    names = [name for name in {**saved, **options} if name not in free and before.get(name) != options.get(name)]
    if names:
        differences = "; ".join(f"{flag(name)} was {before.get(name)}, is {options.get(name)}" for name in names)
        raise UsageError(
            f"cannot resume from {path} with other options: {differences} (what may change: more --epochs, "
            "--workers, --device, --fused, --backend, --compile, --cuda-graphs, and processes with as many images per "
            "update)"
        )


def _images_per_update(options: dict[str, Any]) -> int:
    return options.get("world_size", 1) * math.prod(options.get(name, 0) for name in _PER_UPDATE)
