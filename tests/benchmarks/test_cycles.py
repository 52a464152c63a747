"""The cycle model: what it reads in machine code, what limits it, and that it gives what one H100 measured."""

import pytest
import torch
import triton.language as tl
from torch._subclasses import FakeTensorMode

from benchmarks.cycles.__main__ import calls_of, model_rows, rows
from benchmarks.cycles.kernels import KERNELS, Kernel, device, estimate
from benchmarks.cycles.machine import CONDITIONS, DEVICE_BYTES, run_cycles
from benchmarks.cycles.measured import MICROSECONDS, measured_launches
from benchmarks.cycles.sass import Instruction, forked, loops, parse, trace
from benchmarks.traffic.counting import Kernel as Counted
from benchmarks.workloads import SIZES
from ceit_kernels.common.launch import launch, record_launches
from ceit_kernels.leff.triton.kernels_reduce import leff_statistics_kernel

LOAD = "        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;      /* 0x0000000402047981 */\n"
# Stalls 4 cycles, sets scoreboard 1 and waits for 0 and 2.
CONTROL = f"                                     /* {4 << 41 | 1 << 46 | 7 << 49 | 5 << 52:#018x} */\n"


def test_reads_units_widths_and_the_assemblers_timing():
    (load,) = parse(LOAD + CONTROL)
    assert (load.unit, load.width, load.predicated) == ("load", 16, False)
    assert (load.stall, load.sets, load.frees, load.waits) == (4, 1, 7, 0b101)


def test_reads_products_of_a_warpgroup_and_branches():
    products = [f"HGMMA.64x128x16.F32.BF16 R24, {a}, R24, gsb0" for a in ("gdesc[UR8]", "R4, gdesc[UR8]")]
    lines = [f"    /*0000*/ {text} ; /* {0:#018x} */" for text in (*products, "@P0 BRA `(.L_x_0)")]
    *products, branch = parse("\n".join([".L_x_0:", *lines]))
    assert [(p.unit, p.count, p.ends_group) for p in products] == [("warpgroup", 128, True)] * 2
    assert [p.from_shared for p in products] == [True, False]
    assert (branch.unit, branch.predicated, branch.target) == ("branch", True, 0)


def instructions(count, **options):
    return [Instruction("alu", False, **options) for _ in range(count)]


def test_a_trace_runs_loops_as_often_as_it_is_told():
    code = [*instructions(30), Instruction("branch", True, target=2), Instruction("exit", False)]
    assert loops(code) == [30]
    assert len(trace(code, {30: 5})) == 2 + 5 * 29 + 1


def test_behind_a_ticket_all_but_few_program_instances_end():
    ticket, ahead = Instruction("ticket", True), Instruction("branch", True, target=65)
    code = [*instructions(3), ticket, ahead, *instructions(60), Instruction("exit", False)]
    assert len(trace(code, {})) == 6
    code = [*code[:-1], Instruction("branch", True, target=10), Instruction("exit", False)]
    assert not loops(code)


def test_a_fork_parts_the_program_instances_of_two_kernels_in_one():
    code = [Instruction("branch", True, target=151), *instructions(150), *instructions(10), Instruction("exit", False)]
    first, rest = forked(code, {})
    assert (len(first), len(rest)) == (151, 12)


def test_loads_take_the_bandwidth_of_device_memory_and_instructions_their_units():
    loads = [Instruction("load", False, width=16, sets=0) for _ in range(1000)]
    cycles = run_cycles([*loads, Instruction("alu", False, waits=1)], 1, 4, 1, device, CONDITIONS[0])
    assert cycles == pytest.approx(4 * 1000 * 512 / (DEVICE_BYTES / 4), rel=0.01)
    assert run_cycles(instructions(1000), 1, 4, 1, device, CONDITIONS[0]) == pytest.approx(8000, rel=0.01)


def test_a_warp_waits_for_the_scoreboards_of_its_loads():
    load, use = Instruction("load", False, width=4, sets=0), Instruction("fma", False, waits=1)
    cycles = run_cycles([load, use], 1, 1, 1, device, CONDITIONS[0])
    assert cycles >= CONDITIONS[0].latencies[2]


@pytest.fixture(scope="module")
def statistics():
    with FakeTensorMode(), record_launches() as launches:
        partial, count = torch.empty(128, 2, 64), torch.empty(128)
        tensors = {"p_partial": partial, "p_count": count, "p_norm": torch.empty(5, 64), "p_total": torch.empty(1)}
        sizes = {"T": 128, "EPS": 1e-5, "E": 64, "TILE_T": 64, "TILE_E": 16, "ACC": tl.float32, "momentum": 0.0}
        launch(leff_statistics_kernel, (4,), tensors | sizes, 4, 1)
    return launches[0]


def test_an_estimate_comes_as_a_range_and_refuses_what_it_does_not_know(statistics):
    found = estimate(statistics)
    assert 0 < found.low <= found.high < 20
    with pytest.raises(LookupError, match="expected 0 loops in its machine code, got 2"):
        estimate(statistics, Kernel(device))


def test_kernels_without_an_entry_go_by_their_bytes_and_gemms_by_an_assumed_rate(statistics, monkeypatch):
    monkeypatch.delitem(KERNELS, "leff_statistics_kernel")
    with pytest.raises(LookupError, match="expected an entry"):
        estimate(statistics)
    (name, low, high, how), gemm = rows([statistics], [Counted("aten.mm", 0, 600_000_000, False)])
    assert (name, low, how) == ("leff_statistics_kernel", high, "by its bytes")
    assert gemm[1:] == (1.0, 1.0, "taken at 600 TFLOP/s")


@pytest.mark.prove
@pytest.mark.parametrize("channels", MICROSECONDS)
def test_gives_what_an_h100_measured(channels):
    found = [estimate(*each) for each in measured_launches(channels)]
    low, high = sum(each.low for each in found), sum(each.high for each in found)
    assert 0.95 * low <= MICROSECONDS[channels] <= 1.05 * high
    assert high <= 1.25 * low


@pytest.mark.prove
@pytest.mark.parametrize(("size", "backend", "count"), [("tiny", "triton", 12), ("small", "library", 15)])
def test_knows_the_loops_of_every_kernel_of_a_training_step(size, backend, count):
    launches, gemms = calls_of(SIZES[size], "training", backend)
    found = [*rows(launches, gemms)]
    assert len(found) == count
    assert all(0 < low <= high for _, low, high, _ in found)


@pytest.mark.prove
@pytest.mark.parametrize("phase", ["inference", "training"])
def test_a_model_is_its_leff_and_all_else_by_its_bytes(phase):
    launches, _ = calls_of(SIZES["tiny"], phase, "triton")
    names = {launch.kernel.__name__ for launch in launches}
    layers, *others = model_rows("tiny", phase, [(name, 1.0, 2.0, "") for name in names])
    assert layers[:3] == ("11 LeFF", 11.0 * len(names), 22.0 * len(names))
    last = {"LeFF of the last block"} if phase == "training" else set()
    assert {name for name, *_ in others} == {"all else", *last}
    assert all(0 < low == high for _, low, high, _ in others)
