import copy
import json
import math

import pytest
import torch

from benchmarks import __main__ as main
from benchmarks import readme
from benchmarks.harness.command import select_workloads
from benchmarks.harness.machine import environment, measure_ceilings
from benchmarks.harness.workloads import plan
from benchmarks.pictures import ratio_bars
from benchmarks.report import again, write_report
from ceit_kernels.operators import OPERATORS


@pytest.fixture
def stored():
    return json.loads(readme.STORED.read_text())


@pytest.fixture
def scaled(stored):
    curve = {"axis": "batch", "phase": "inference", "implementation": "plain", "sizes": [1, 2], "seconds": [0.1, 0.2]}
    curve |= {"peak_bytes": [1000, 2000], "time_exponent": 1.0, "memory_exponent": 1.0}
    return {**stored, "scaling": [curve, {**curve, "implementation": "fused"}]}


def test_readme_has_the_stored_results(stored):
    text = readme.README.read_text()
    assert readme.with_results(text, readme.results_text(stored)) == text, "run python -m benchmarks.readme"


def test_changed_results_change_the_readme(stored):
    text = readme.README.read_text()
    stored["measured"][0]["entries"][0]["seconds"] = [123.0]
    assert readme.with_results(text, readme.results_text(stored)) != text


def test_frozen_has_a_column_where_a_report_has_frozen_times(stored):
    assert "frozen, ms" not in readme.results_text(stored)
    entries = stored["measured"][0]["entries"]
    entries.append({**entries[-1], "implementation": "frozen", "seconds": [4.321e-3]})
    text = readme.results_text(stored)
    assert "| fused, ms | frozen, ms |" in text
    assert "| 4.32 |" in text


def test_readme_without_markers():
    with pytest.raises(ValueError, match="expected the lines"):
        readme.with_results("nothing", "text")


def test_report_marks_what_is_modelled_and_what_refused(scaled, tmp_path):
    data = copy.deepcopy(scaled)
    entry = data["measured"][0]["entries"][-1]
    entry |= {"status": "refused", "reason": "output: relative error 1e-01", "seconds": [], "ratio": None}
    data["scaling_refused"] = ["scaling, batch 1, training: fused refused: gradient"]
    refused = write_report(data, tmp_path)
    assert len(refused) == 2
    text = (tmp_path / "report.md").read_text()
    assert "refused: output: relative error 1e-01" in text
    assert "Modelled for an H100, not measured" in text
    assert "No point: scaling, batch 1" in (tmp_path / "scaling.md").read_text()
    for name in ("roofline", "scaling", "ratios-leff"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "report.json").read_text())["environment"] == data["environment"]


@pytest.mark.parametrize("quick", [False, True])
def test_every_workload_of_a_report_can_be_measured_again(quick):
    command = "python -m benchmarks" + (" --quick" if quick else "")
    for workload in plan(torch.device("cpu"), quick=quick):
        words = again({"command": command}, workload.name).split()
        assert select_workloads(plan(torch.device("cpu"), quick="--quick" in words), words[-1]) == [workload]


def test_refused_implementation_is_named_in_the_picture(stored):
    result = copy.deepcopy(stored["measured"][0])
    result["entries"][-1] |= {"status": "refused", "seconds": [], "ratio": None}
    figure = ratio_bars("leff", [result], "measured")
    assert "refused" in [text.get_text() for text in figure.axes[0].texts]


def test_redraw_of_a_file_that_is_not_there(tmp_path, capsys):
    assert main.main(["--redraw", str(tmp_path / "no.json"), "--output", str(tmp_path)]) == 2
    assert "--redraw" in capsys.readouterr().err


def test_modelled_stem_has_products(stored):
    rows = [r for r in stored["modelled"]["rows"] if (r["operator"], r["implementation"]) == ("i2t", "fused")]
    assert rows
    assert all(row["flops"] > 0 for row in rows)


def test_environment_and_ceilings():
    found = environment(torch.device("cpu"))
    assert found["threads"] >= 1
    assert {"torch", "openvino", "onnxruntime"} <= found["versions"].keys()
    assert {row["operator"] for row in found["backends"]} == set(OPERATORS)
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32, {"copy_bytes": 1 << 20, "product": 64})
    assert all(math.isfinite(value) and value > 0 for value in ceilings.values())
