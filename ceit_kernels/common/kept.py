"""What was measured on a GPU: kept in this process, and in a file that later processes read."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

__all__ = ["Kept", "cache_path", "key_of"]

Entry = TypeVar("Entry")


def cache_path() -> Path:
    """The file that tuned tiles are kept in; other findings are kept beside it."""
    default = Path.home() / ".cache" / "ceit_kernels" / "tuning.json"
    return Path(os.environ.get("CEIT_KERNELS_TUNING_CACHE", default))


def key_of(call: str, dtype: torch.dtype, device: torch.device) -> str:
    """The key of what was measured of a kind of call, by this chip and these versions."""
    return "|".join((call, str(dtype).removeprefix("torch."), chip_name(device), *_versions()))


@cache
def chip_name(device: torch.device) -> str:
    """The name of a GPU."""
    return torch.cuda.get_device_name(device)


@cache
def _versions() -> tuple[str, ...]:
    def installed(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"{package} ?"

    return tuple(installed(package) for package in ("ceit-kernels", "torch", "triton"))


class Kept(Generic[Entry]):
    """Entries by key.

    Args:
        suffix: of the file, in the place of that of ``cache_path``; if empty it is that one.
        what: they are, for warnings.
        parse: makes an entry of what JSON has of it; raises ValueError, TypeError or KeyError for anything else.
        as_json: the other way round.
    """

    def __init__(self, suffix: str, what: str, parse: Callable[[Any], Entry], as_json: Callable[[Entry], Any]) -> None:
        self._suffix, self._what, self._parse, self._as_json = suffix, what, parse, as_json
        self.forget()

    def forget(self) -> None:
        """Forget what is known in this process, but for the file."""
        self._known: dict[tuple[Path, str], Entry] = {}
        self._read: set[Path] = set()

    def path(self) -> Path:
        """The file."""
        return cache_path().with_suffix(self._suffix) if self._suffix else cache_path()

    def find(self, key: str) -> Entry | None:
        """The entry of a key, if there is one."""
        path = self.path()
        if path not in self._read:
            self._read.add(path)
            for known, entry in self._load(path).items():
                self._known.setdefault((path, known), entry)
        return self._known.get((path, key))

    def everything(self) -> dict[str, Entry]:
        """All that is known, by key."""
        self.find("")
        return {key: entry for (path, key), entry in self._known.items() if path == self.path()}

    def keep(self, key: str, entry: Entry) -> None:
        """Add an entry to those that other processes may have written meanwhile; the file is replaced as a whole."""
        path = self.path()
        self._known[path, key] = entry
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file that was named when it was read
            entries = {**self._load(path), key: entry}
        text = json.dumps({key: self._as_json(entry) for key, entry in sorted(entries.items())}, indent=1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
                file.write(text)
            os.replace(file.name, path)
        except OSError as error:
            warnings.warn(f"{path}: {self._what} hold for this process alone: {error}", stacklevel=2)

    def _load(self, path: Path) -> dict[str, Entry]:
        """The entries in a file. One that cannot be read is named in a warning, and counts as empty."""
        try:
            return {key: self._parse(entry) for key, entry in json.loads(path.read_text()).items()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            warnings.warn(f"{path}: expected {self._what}, which are found again: {error!r}", stacklevel=2)
            return {}
