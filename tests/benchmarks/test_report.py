import dataclasses
import json
import math

import pytest
import torch
from support.bench_report import make_report

from benchmarks import readme
from benchmarks.__main__ import main
from benchmarks.harness import machine
from benchmarks.pictures import ratio_bars
from benchmarks.report import write_report
from benchmarks.results import Report
from benchmarks.session import Session
from benchmarks.traffic import count_workload
from benchmarks.workloads import PHASES, Workload
from ceit_kernels.operators import OPERATORS

CPU = torch.device("cpu")


@pytest.fixture
def report():
    return make_report(CPU)


def test_page_has_the_stored_results():
    page = readme.PAGE.read_text()
    for device in readme.STORED:
        rows = readme.stored_rows(device)
        assert readme.with_results(page, device, rows) == page, "run python -m benchmarks.readme"


def test_a_report_replaces_the_stored_results(report, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    sections = [f"{readme.begin(device)}\nold\n{readme.END}\n" for device in readme.STORED]
    page.write_text(f"above\n{sections[0]}between\n{sections[1]}below\n")
    monkeypatch.setattr(readme, "PAGE", page)
    stored = {device: tmp_path / path.name for device, path in readme.STORED.items()}
    monkeypatch.setattr(readme, "STORED", stored)
    (tmp_path / "report.json").write_text(json.dumps(dataclasses.asdict(report)))
    assert readme.main([str(tmp_path / "report.json")]) == 0
    text = page.read_text()
    assert text.startswith(f"above\n{readme.begin('cpu')}\n\nMeasured on a chip, 2 threads")
    none = "\n\nNo such machine has run it yet.\n\n"
    assert text.endswith(f"{readme.END}\nbetween\n{readme.begin('cuda')}{none}{readme.END}\nbelow\n")
    assert "| leff-tiny-inference-float32-b16 | 204.00 | 153.00 | 102.00 | 2.00 (2.00 to 2.00) | native |" in text
    assert "scaling" not in text


def test_frozen_has_a_column_where_a_report_has_frozen_times(report):
    assert "frozen, ms" not in readme.results_rows(report)[1]
    entries = report.results[0].entries
    entries.append(dataclasses.replace(entries[-2], implementation="frozen", seconds=[4.321e-3]))
    rows = readme.results_rows(report)
    assert rows[1][3:5] == ["fused, ms", "frozen, ms"]
    assert rows[2][4] == "4.32"


def test_page_without_markers():
    with pytest.raises(ValueError, match="expected the line "):
        readme.with_results("nothing", "cpu", [["text"]])


def test_report_marks_what_is_modelled_and_what_refused(report, tmp_path):
    refused = {"status": "refused", "reason": "output: relative error 1e-01", "seconds": [], "ratio": None}
    for result in (report.results[0], report.results[-1]):
        vars(result["fused"]).update(refused)
    write_report(report, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "refused: output: relative error 1e-01" in text
    assert "Modelled for an H100, not measured" in text
    assert (
        "No point: scaling-model-tiny-training-float32-depth12: fused refused" in (tmp_path / "scaling.md").read_text()
    )
    for name in ("roofline", "scaling", "batches", "ratios-leff"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert Report.load(tmp_path / "report.json") == report


def test_report_of_a_disturbed_machine_says_so(report):
    assert not report.disturbances()
    report.ceilings["float32"]["flops_per_second"] = 1.0
    vars(report.results[0]["fused"])["backends"]["leff"]["backend"] = "reference"
    assert "leff-tiny-inference-float32-b16: plain is above the ceiling of a matmul" in report.disturbances()
    assert any("is plain PyTorch here, yet took 1/2.00 of its time" in sign for sign in report.disturbances())
    assert report.warning()[0].startswith("**The machine was disturbed")


@pytest.mark.parametrize("quick", [False, True])
def test_every_workload_of_a_report_can_be_measured_again(report, quick):
    report.command = "python -m benchmarks" + (" --quick" if quick else "")
    for workload in Session(quick=quick, device="cpu").cases:
        words = report.again(workload.name).split()
        assert list(Session(quick="--quick" in words, only=words[-1], device="cpu").cases) == [workload]


def test_refused_implementation_is_named_in_the_picture(report):
    vars(report.results[0]["fused"]).update(status="refused", seconds=[], ratio=None)
    figure = ratio_bars("leff", report.results[:1], "measured")
    assert "refused" in [text.get_text() for text in figure.axes[0].texts]


def test_a_stored_report_is_made_again(report, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.report.draw_all", lambda report, folder: {})
    write_report(report, tmp_path / "first")
    stored = str(tmp_path / "first" / "report.json")
    assert main(["--redraw", stored, "--report", str(tmp_path / "second")]) == 0
    assert (tmp_path / "second" / "report.md").read_text() == (tmp_path / "first" / "report.md").read_text()
    with pytest.raises(SystemExit):
        main(["--redraw", str(tmp_path / "no.json")])
    assert "--redraw" in capsys.readouterr().err


@pytest.mark.parametrize("operator", ["i2t", "model"])
def test_counted_stem_has_flops(operator):
    for phase in PHASES:
        fused = count_workload(Workload(operator, "tiny", phase, "bfloat16", 2), "fused")
        stems = [kernel for kernel in fused.kernels if "i2t" in kernel.name]
        assert stems
        assert all(kernel.flops > 0 for kernel in stems)


def test_environment_and_ceilings(monkeypatch):
    found = machine.environment(CPU)
    assert found["threads"] >= 1
    assert {"torch", "openvino", "onnxruntime"} <= found["versions"].keys()
    assert {row["operator"] for row in found["backends"]} == set(OPERATORS)
    monkeypatch.setitem(machine._SIZES, "cpu", (1 << 20, 64))
    ceilings = machine.measure_ceilings(CPU, torch.float32)
    assert all(math.isfinite(value) and value > 0 for value in ceilings.values())
