"""Errors of users: what a job was told to do cannot be done."""

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """An option, or a file that an option names, cannot be used; the message is one line for the user."""


@contextmanager
def usage_errors(what: str) -> Iterator[None]:
    """Turn what a library raises about the user's input into a `UsageError` that begins with `what`."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, TypeError, RuntimeError, OSError, AssertionError) as error:
        raise UsageError(f"{what}: {' '.join(str(error).split())}") from error


@contextmanager
def needed(what: str, install: str) -> Iterator[None]:
    """Turn the lack of a package into a `UsageError` that says what needs it and how it is installed."""
    try:
        yield
    except ImportError as error:
        raise UsageError(f"{what} needs {(error.name or '').split('.')[0]}: pip install '{install}'") from error
