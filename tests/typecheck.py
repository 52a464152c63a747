"""Checks types with basedpyright: no error in the public modules, and in the rest no more than there were.

`python tests/typecheck.py` is a part of `make lint`.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What users import: files, and the modules of every operator.
PUBLIC = (
    *("ceit_kernels/__init__.py", "ceit_kernels/backends.py", "ceit_kernels/explain.py"),
    *("ceit_kernels/freeze.py", "ceit_kernels/fuse.py", "ceit_kernels/graphs.py", "ceit_kernels/warm_up.py"),
    *("ceit_kernels/*/__init__.py", "ceit_kernels/*/functional.py", "ceit_kernels/*/module.py"),
    *("ceit_kernels/linear/patches.py", "ceit_kernels/operators.py"),
    *("ceit/__init__.py", "ceit/blocks.py", "ceit/checkpoint.py", "ceit/embed.py", "ceit/encode.py"),
    *("ceit/freezing.py", "ceit/layers.py", "ceit/model.py", "ceit/registry.py", "ceit/shortcuts.py"),
)
# Errors elsewhere. It only ever falls: lower it with them.
BASELINE = 100


def errors() -> list[tuple[str, str]]:
    """The path and the text of every error."""
    command = [sys.executable, "-m", "basedpyright", "--outputjson"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)["generalDiagnostics"]
    except ValueError:
        sys.exit(done.stdout + done.stderr)
    located = []
    for each in (each for each in found if each["severity"] == "error"):
        path, start = Path(each["file"]).relative_to(ROOT), each["range"]["start"]
        message = each["message"].splitlines()[0]
        located.append((str(path), f"{path}:{start['line'] + 1}: {message} ({each.get('rule', 'error')})"))
    return located


def main() -> int:
    """Print what is wrong; returns the exit status."""
    found = errors()
    public = [text for path, text in found if any(Path(path).match(pattern) for pattern in PUBLIC)]
    others = [path for path, _ in found if not any(Path(path).match(pattern) for pattern in PUBLIC)]
    if "--all" in sys.argv:
        print(*(text for _, text in found), sep="\n")
    print(*public, sep="\n")
    if len(others) > BASELINE:
        print(*(f"{count:4} {path}" for path, count in Counter(others).most_common()), sep="\n")
    print(f"{len(public)} errors in public modules, 0 expected; {len(others)} elsewhere, at most {BASELINE} expected")
    return int(bool(public) or len(others) > BASELINE)


if __name__ == "__main__":
    sys.exit(main())
