"""Writing files so that nothing is lost, and a folder for one run at a time."""

import csv
import io
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UsageError, usage_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_LOCK = ".lock"


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that at any moment, even if the machine fails, `path` is either the old file or the new one.

    Args:
        path: the file to make or replace.
        write: writes the contents to a binary file. If it raises, `path` stays as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
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


def write_json_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write one line of JSON per record, atomically."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(path, lambda file: file.write(lines.encode()))


def write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write records as CSV with a line of names, atomically."""
    write_atomically(path, lambda file: file.write(csv_text(records).encode()))


def csv_text(records: Sequence[dict[str, Any]]) -> str:
    """Records as CSV, under the names of all of them."""
    text = io.StringIO()
    names = dict.fromkeys(name for record in records for name in record)
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


@contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """Make a folder, keep other runs out of it, and remove what a killed run left half written.

    The lock goes with the process, however it ends; processes that it starts do not inherit it.

    Raises:
        UsageError: the folder cannot be made or written to, or another run is using it.
    """
    with usage_errors(f"--output {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("a")
    with lock:
        if fcntl is not None:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"--output {folder} is in use by another run: give another folder") from error
            except OSError:  # a file system without locks
                pass
        for partial in folder.glob(".*.partial"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        yield folder
