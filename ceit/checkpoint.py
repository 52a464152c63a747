"""Reading checkpoints into a model, without running anything that a file contains."""

import logging
import math
import re
import stat
import zipfile
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ceit_kernels.common.arguments import names_its_arguments

from .model import CeiT

_logger = logging.getLogger(__name__)

_WEIGHTS = ("model", "state_dict")
_EMA_WEIGHTS = ("model_ema", "state_dict_ema")
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_MAX_LISTED = 8


class _Inert:
    """Takes the place of an object that a checkpoint carries beside the weights; swallows its contents."""

    def __new__(cls, *args: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _empty_dict(*args: Any) -> dict:
    """Takes the place of `defaultdict`, whose items are kept and whose factory is never called."""
    return {}


def _empty_list(*args: Any) -> list:
    """Takes the place of `deque`."""
    return []


_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path", "PurePath")
# Scalars, arrays and their types; NumPy 2 has moved the functions, protocol 5 has one of its own.
_NUMPY_FUNCTIONS = ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
_NUMPY = ["dtype", "ndarray", *(f"{core}.{name}" for core in ("core", "_core") for name in _NUMPY_FUNCTIONS)]

# What training scripts keep next to the weights: their arguments, times, measures, and paths among these.
_STAND_INS = [
    *((_Inert, name) for name in ("argparse.Namespace", "types.SimpleNamespace")),
    *((_Inert, f"datetime.{name}") for name in ("datetime", "date", "time", "timedelta", "timezone")),
    # Python 3.13 moved the paths, 3.14 moved them back.
    *((_Inert, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *((_Inert, f"numpy.{name}") for name in _NUMPY),
    # The factories of a defaultdict.
    *((_Inert, f"builtins.{name}") for name in ("int", "float", "str", "bool", "list", "dict", "tuple")),
    (_empty_dict, "collections.defaultdict"),
    (_empty_list, "collections.deque"),
]


@names_its_arguments
def load_checkpoint(
    model: nn.Module, path: str | PathLike, *, use_ema: bool = False, exclude: Collection[str] = ()
) -> None:
    """Load the weights of a checkpoint into a CeiT, plain or fused, bare or wrapped (DDP, torch.compile).

    The file is a safetensors file, or was written by `torch.save`: a state_dict, or a dict that holds one under
    "model" or "state_dict". Nothing in the file is run: of a pickle only tensors and plain containers are built.
    Position embeddings are resampled if their number differs from the model's; the checkpoint's grid is then taken to
    be square. BatchNorm's counters of batches, which old files lack, then keep the model's own values. Weights that
    are infinite or no numbers are loaded, with a warning that names them.

    Args:
        model: the model, or a wrapper of it. It is changed only if the whole checkpoint fits.
        path: the file.
        use_ema: whether to take the averaged weights, under "model_ema" or "state_dict_ema".
        exclude: parameters and buffers, or modules such as "head", that keep the model's own values.

    Raises:
        OSError: if the file cannot be opened.
        TypeError: if there is no `CeiT` in the model.
        ValueError: if the file is unreadable, holds no such weights, or its names, shapes and kinds of tensors do not
            match the model's; if neither has what is excluded; or the model is on the meta device.
    """
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    source = _select_weights(read_checkpoint(Path(path)), path, use_ema)
    named = {_unwrapped(name): tensor for name, tensor in model.state_dict().items()}
    targets = {name: tensor for name, tensor in named.items() if not _matches(name, exclude)}
    if any(tensor.is_meta for tensor in targets.values()):
        raise ValueError("model: expected one with memory for its weights, got some on the meta device; call to_empty")
    _check_tensors(source, targets, path)
    weights = _with_counters(checkpoint_filter_fn(source, model), targets)
    unknown = [name for name in exclude if not any(_matches(found, [name]) for found in {**weights, **named})]
    if unknown:
        raise ValueError(f"exclude: neither the model nor checkpoint {path} has {_listed(unknown)}")
    weights = {name: tensor for name, tensor in weights.items() if not _matches(name, exclude)}
    problems = _mismatches(weights, targets)
    if problems:
        hint = "nothing was loaded; exclude= leaves parts of the model as they are"
        raise ValueError("\n  ".join([f"checkpoint {path} does not match the model, {hint}:", *problems]))
    broken = [name for name, target in targets.items() if not weights[name].to(target.dtype).isfinite().all()]
    if broken:
        _logger.warning("%s has infinities or NaN in %d tensors: %s", path, len(broken), _listed(broken))
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(weights[name])
    _logger.info("Loaded %d tensors from %s", len(targets), path)


def number_of_outputs(path: str | PathLike, *, use_ema: bool = False) -> int | None:
    """Rows of the classifier in a file, None where it has none; arguments and errors are those of `load_checkpoint`."""
    weights = _select_weights(read_checkpoint(Path(path)), path, use_ema)
    heads = [tensor for name, tensor in weights.items() if _unwrapped(name) == "head.weight" and tensor.ndim == 2]
    return heads[0].shape[0] if heads else None


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit a state_dict to a model: wrappers' prefixes are stripped, position embeddings resampled to its grid.

    Args:
        state_dict: weights by name.
        model: a `CeiT`, or a wrapper of one.

    Returns:
        Weights by name. Positions whose grid is not known, for want of a square number, are left as they are.

    Raises:
        TypeError: if there is no `CeiT` in the model.
    """
    weights = {_unwrapped(name): tensor for name, tensor in state_dict.items()}
    ceit = next((module for module in model.modules() if isinstance(module, CeiT)), None)
    if ceit is None:
        raise TypeError(f"model: expected a CeiT or a wrapper of one, got {type(model).__name__}")
    positions = weights.get("pos_embed")
    if positions is not None and _can_be_resampled(positions, ceit.pos_embed):
        num_patches = max(positions.shape[1] - ceit.num_prefix_tokens, 0)
        side = math.isqrt(num_patches)
        if side and side * side == num_patches:
            grid_size = list(ceit.grid_size)
            weights["pos_embed"] = resample_abs_pos_embed(positions, grid_size, [side, side], ceit.num_prefix_tokens)
    return weights


def _can_be_resampled(positions: Tensor, target: Tensor) -> bool:
    """Whether these are positions (1, N, C) of another N, each in memory of its own: a shape may claim more."""
    if positions.ndim != 3 or positions.shape[1] == target.shape[1]:
        return False
    if (positions.shape[0], positions.shape[2]) != (1, target.shape[2]) or not positions.is_floating_point():
        return False
    return positions.numel() * positions.element_size() <= positions.untyped_storage().nbytes()


def read_checkpoint(path: Path) -> Any:
    """The contents of a file, restricted to tensors and plain containers; nothing that the file contains is run.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is no file (a pipe, a device), damaged, or contains anything else.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"checkpoint {path} cannot be loaded: it is a pipe or a device, expected a file")
    with path.open("rb") as file:
        try:
            if path.suffix == ".safetensors":
                return safetensors.torch.load(file.read())
            if zipfile.is_zipfile(file):
                _check_not_compressed(zipfile.ZipFile(file))
            file.seek(0)
            with torch.serialization.safe_globals(_STAND_INS):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"checkpoint {path} cannot be loaded: {_reason(error)}") from error


def _check_not_compressed(archive: zipfile.ZipFile) -> None:
    """torch.save compresses nothing; a few kilobytes that unpack to gigabytes are not its work."""
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise zipfile.BadZipFile


def _reason(error: Exception) -> str:
    """Why a file cannot be read; torch's own advice, to load it with less safety, is left out."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"it asks for {refused[1]}, and only tensors and plain containers are read"
    return f"it is damaged or no checkpoint ({type(error).__name__})"


def _select_weights(contents: Any, path: str | PathLike, use_ema: bool) -> Mapping[str, Tensor]:
    if not isinstance(contents, Mapping):
        raise ValueError(f"checkpoint {path} holds a {type(contents).__name__}, expected a dict")
    names = _EMA_WEIGHTS if use_ema else _WEIGHTS
    # Without any of the names the file may be a bare state_dict.
    candidates = [contents[name] for name in names if name in contents] + ([] if use_ema else [contents])
    for weights in candidates:
        if _is_state_dict(weights):
            return weights
    raise ValueError(
        f"checkpoint {path} holds no state_dict under {' or '.join(map(repr, names))}; it has: "
        + _listed([str(name) for name in contents])
    )


def _is_state_dict(contents: Any) -> bool:
    if not isinstance(contents, Mapping) or not contents:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in contents.items())


def _unwrapped(name: str) -> str:
    """A parameter's name without what DDP, FSDP, torch.compile, checkpointing and averaging put between its parts."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _with_counters(weights: dict[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the model's counter of batches where they have a BatchNorm's mean but no counter."""
    counters = {name.replace("running_mean", "num_batches_tracked") for name in weights if "running_mean" in name}
    return {**{name: targets[name] for name in counters if name in targets}, **weights}


def _matches(name: str, exclude: Collection[str]) -> bool:
    return any(name == excluded or name.startswith(f"{excluded}.") for excluded in exclude)


def _check_tensors(weights: Mapping[str, Tensor], targets: Mapping[str, Tensor], path: str | PathLike) -> None:
    """Raise `ValueError` if a tensor is of a kind that cannot be copied into the model's of its name."""
    unfit = []
    for name, tensor in weights.items():
        target = targets.get(_unwrapped(name))
        problem = None if target is None else _kind_problem(tensor, target)
        if problem:
            unfit.append(f"{name} is {problem}")
    if unfit:
        raise ValueError(f"checkpoint {path} does not match the model, nothing was loaded: {_listed(unfit)}")


def _kind_problem(tensor: Tensor, target: Tensor) -> str | None:
    if tensor.is_nested or tensor.layout != torch.strided:
        return "sparse or nested"
    if tensor.is_meta:
        return "without values (on the meta device)"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_floating_point() != target.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        return f"of type {str(tensor.dtype).removeprefix('torch.')}"
    return None


def _mismatches(weights: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> list[str]:
    """One line for each way in which the names and shapes differ."""
    missing = [name for name in targets if name not in weights]
    unexpected = [name for name in weights if name not in targets]
    shapes = [
        f"{name}: {tuple(weights[name].shape)} given, {tuple(target.shape)} expected"
        for name, target in targets.items()
        if name in weights and weights[name].shape != target.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "wrong shape": shapes}
    return [f"{kind} ({len(names)}): {_listed(names)}" for kind, names in kinds.items() if names]


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
