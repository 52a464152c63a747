"""Tuned block sizes: when they are timed, what is taken, and the file that keeps them. Time is a function here."""

import json

import pytest
import torch

from ceit_kernels.common import kept, tuning
from ceit_kernels.common.launch import record_launches
from ceit_kernels.common.tuning import Tiles, autotune, tuned_tiles

TABLE = Tiles({"TILE_M": 64, "TILE_E": 32}, num_warps=8, num_stages=2)
SHAPE = {"tokens": 100, "E": 256}


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """The blocks that were timed. Each row and each warp costs, so the least of both wins."""
    runs = []

    def seconds(run):
        run()
        return runs[-1].sizes["TILE_M"] + runs[-1].num_warps + runs[-1].num_stages

    monkeypatch.delenv("CEIT_KERNELS_AUTOTUNE", raising=False)
    monkeypatch.setenv("CEIT_KERNELS_TUNING_CACHE", str(tmp_path / "folder" / "tuning.json"))
    monkeypatch.setattr(tuning, "gpu_seconds", seconds)
    monkeypatch.setattr(tuning, "has_clock", lambda x: True)
    monkeypatch.setattr(kept, "chip_name", lambda device: "a chip")
    tuning._kept.forget()
    yield runs
    tuning._kept.forget()


def choose(runs, shape=SHAPE, table=TABLE, dtype=torch.bfloat16):
    return tuned_tiles("kernel", table, shape, torch.empty(1), dtype, runs.append)


BEST = Tiles({"TILE_M": 32, "TILE_E": 32}, num_warps=4, num_stages=1)


def test_the_table_is_taken_and_nothing_timed_unless_asked_for(timed):
    assert choose(timed) == TABLE
    assert not timed
    assert not kept.cache_path().exists()


def test_the_fastest_is_taken_and_a_shape_timed_once(timed):
    with autotune():
        assert choose(timed) == BEST
        assert timed[0] == TABLE
        count = len(timed)
        assert count == len({str(blocks) for blocks in timed})
        assert choose(timed) == BEST
        assert len(timed) == count


@pytest.mark.parametrize(("name", "rows"), [("TILE_M", (64, 128, 32)), ("TILE_M", (16, 32)), ("TILE_P", (8, 16, 4))])
def test_candidates_are_the_tables_neighbours(name, rows):
    table = Tiles({name: rows[0], "TILE_E": 32}, num_warps=8, num_stages=2)
    found = tuning._candidates(table)
    assert found[0] == table
    assert all(tiles.sizes["TILE_E"] == 32 for tiles in found)
    shapes = [(tiles.sizes[name], tiles.num_warps, tiles.num_stages) for tiles in found]
    assert sorted(shapes) == sorted((r, w, s) for r in rows for w in (4, 8) for s in (1, 2, 3, 4))


def test_the_environment_asks_and_the_context_manager_outranks_it(timed, monkeypatch):
    assert not tuning._asked_by_environment()
    monkeypatch.setenv("CEIT_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_asked", tuning._asked_by_environment())
    with autotune(False):
        assert choose(timed) == TABLE
    assert choose(timed) == BEST


def test_a_later_process_reads_the_winner(timed, monkeypatch):
    with autotune():
        choose(timed)
        tuning._kept.forget()
        timed.clear()
        assert choose(timed) == BEST
    assert not timed
    assert [path.name for path in kept.cache_path().parent.iterdir()] == ["tuning.json"]


def test_batches_of_about_one_size_share_a_winner_and_other_calls_do_not(timed, monkeypatch):
    with autotune():
        choose(timed)
        count = len(timed)
        choose(timed, {**SHAPE, "tokens": 128})
        assert len(timed) == count
        choose(timed, {**SHAPE, "tokens": 129})
        choose(timed, {**SHAPE, "E": 128})
        choose(timed, dtype=torch.float16)
        monkeypatch.setattr(kept, "chip_name", lambda device: "another chip")
        choose(timed)
        monkeypatch.setattr(kept, "_versions", lambda: ("another version",))
        choose(timed)
    assert len(timed) == 6 * count
    assert len(json.loads(kept.cache_path().read_text())) == 6


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a": 1}', '{"a": {"sizes": {"TILE_M": "x"}, "num_warps": 4, "num_stages": 1}}']
)
def test_a_file_that_cannot_be_read_is_named_and_replaced(timed, text, monkeypatch):
    path = kept.cache_path()
    path.parent.mkdir()
    path.write_text(text)
    with autotune():
        with pytest.warns(UserWarning, match=r"tuning\.json: expected tuned tile sizes") as warned:
            assert choose(timed) == BEST
        assert len(warned) == 1
        tuning._kept.forget()
        timed.clear()
        assert choose(timed) == BEST
    assert not timed


def test_the_file_is_made_with_the_folders_that_it_is_in(timed, monkeypatch, tmp_path):
    monkeypatch.setenv("CEIT_KERNELS_TUNING_CACHE", str(tmp_path / "cache" / "of mine" / "tuning.json"))
    with autotune():
        choose(timed)
    assert kept.cache_path().exists()


def test_what_another_process_wrote_meanwhile_is_kept(timed):
    with autotune():
        choose(timed)
        path = kept.cache_path()
        entries = json.loads(path.read_text())
        path.write_text(json.dumps({**entries, "another": BEST._asdict()}))
        choose(timed, {**SHAPE, "E": 128})
    assert len(json.loads(path.read_text())) == 3


def test_a_winner_for_other_blocks_than_the_kernel_has_is_found_again(timed, monkeypatch):
    with autotune():
        choose(timed)
        tuning._kept.forget()
        timed.clear()
        table = Tiles({"TILE_M": 64, "TILE_E": 32, "TILE_C": 16}, num_warps=8)
        assert choose(timed, table=table).sizes.keys() == table.sizes.keys()
    assert timed


def test_a_folder_that_cannot_be_written_is_named(timed):
    kept.cache_path().parent.write_text("a file")
    with autotune(), pytest.warns(UserWarning, match="hold for this process alone"):
        assert choose(timed) == BEST


def test_a_candidate_that_fails_in_any_way_is_passed_over(timed):
    def run(blocks):
        timed.append(blocks)
        if blocks.num_warps == 4:
            raise RuntimeError("CUDA error")

    with autotune():
        best = tuned_tiles("kernel", TABLE, SHAPE, torch.empty(1), torch.bfloat16, run)
    assert best == Tiles({"TILE_M": 32, "TILE_E": 32}, num_warps=8, num_stages=1)


def test_nothing_is_timed_while_a_graph_is_captured_or_launches_are_recorded(timed, monkeypatch):
    with autotune():
        with record_launches():
            assert choose(timed) == TABLE
        with monkeypatch.context() as capturing:
            capturing.setattr(tuning, "is_capturing", lambda: True)
            assert choose(timed) == TABLE
            assert not timed
        assert choose(timed) == BEST
        monkeypatch.setattr(tuning, "is_capturing", lambda: True)
        assert choose(timed) == BEST  # what is known holds in a graph too


def test_without_a_gpu_the_table_is_taken(timed, monkeypatch):
    monkeypatch.undo()
    with autotune():
        assert choose(timed) == TABLE
    assert not timed
