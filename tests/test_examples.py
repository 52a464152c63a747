"""The examples and the README's code run as they are."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from support.adapters import assert_equal_in_float64, grown

from ceit_kernels import explain, freeze

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs_and_compares_well(path, capsys):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main()
    printed = capsys.readouterr().out
    assert printed
    differences = [float(number) for number in re.findall(r"largest difference (\S+)", printed)]
    assert all(difference < 1e-4 for difference in differences)


def code_of(document):
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


@pytest.mark.parametrize(("document", "pieces"), [("README.md", 2), ("docs/adapters.md", 2)])
def test_the_documents_code_runs(document, pieces, monkeypatch):
    fusions = importlib.import_module("ceit_kernels.fuse")._fusions
    monkeypatch.setattr(importlib.import_module("ceit_kernels.fuse"), "_fusions", dict(fusions))
    found = code_of(document)
    assert len(found) == pieces
    names = {"__name__": document}
    for code in found:
        exec(compile(code, document, "exec"), names)


def test_the_documents_block_of_ones_own_is_fused_and_frozen(monkeypatch):
    fusions = importlib.import_module("ceit_kernels.fuse")._fusions
    monkeypatch.setattr(importlib.import_module("ceit_kernels.fuse"), "_fusions", dict(fusions))
    names = {"__name__": "of_ones_own"}
    exec(code_of("docs/adapters.md")[-1], names)
    assert_equal_in_float64(grown(names["UformerLeFF"](8, 24)), (torch.randn(2, 25, 8, dtype=torch.float64),))
    frozen = freeze(names["UformerLeFF"]())
    assert explain(frozen)[0].reason.startswith("frozen; ")


def test_the_documents_links_lead_somewhere():
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            assert target.startswith("https://") or (document.parent / target).exists(), (document.name, target)
