"""Runs of several processes equal one process, go on bitwise as they were, and read what any number of others wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.train.distributed.launch import launch
from tests.train.distributed.runs import CUT, STEPS, Run, resumed, run

from kvern.train.mesh import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
RUNS = "tests.train.distributed.runs:"


def assert_bitwise(one: Run, other: Run) -> None:
    assert one.state.keys() == other.state.keys()
    assert [name for name, tensor in one.state.items() if not torch.equal(tensor, other.state[name])] == []
    assert one.metrics == other.metrics


def assert_close(one: Run, other: Run, weights: float = 1e-6) -> None:
    """Weights within `weights`, losses and norms within 1e-6 of their size; loads are counts, and equal."""
    for name, tensor in one.state.items():
        if not name.endswith(("exp_avg", "exp_avg_sq")):
            torch.testing.assert_close(tensor, other.state[name], rtol=0, atol=weights, msg=name)
    for row, expected in zip(one.metrics, other.metrics, strict=True):
        for key in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=1e-6), key
        same = ("step", "tokens", "lr", "batch", "load_max_over_mean")
        assert {key: row[key] for key in same} == {key: expected[key] for key in same}


def assert_all_rows_once(runs: list[Run], rows: int, first: int = 0) -> None:
    assert sorted(index for one in runs for index in one.asked) == list(range(first, rows))


def check(world: int, expert: int, folder: Path) -> list[dict[str, Run]]:
    """Interrupted runs of `world` processes against each other and against one process."""
    found = launch(world, RUNS + "interrupted", folder, expert=expert)
    ranks = [{name: one[name] for name in ("whole", "begun", "cut")} for one in found]
    for one in ranks:
        assert_bitwise(one["cut"], one["whole"])
        assert_bitwise(one["whole"], ranks[0]["whole"])
    (folder / "alone").mkdir()
    alone = run(ALONE, folder / "alone", STEPS)
    assert_close(ranks[0]["whole"], alone, weights=5e-6)  # 2 % of a step: Adam's first ones go by a gradient's sign
    rows = sum(row["batch"] for row in alone.metrics)
    assert_all_rows_once([one["whole"] for one in ranks], rows)
    return ranks


def test_two_processes_train_and_one_goes_on(tmp_path: Path) -> None:
    ranks = check(2, 2, tmp_path)
    (tmp_path / "one").mkdir()
    assert_close(resumed(ALONE, tmp_path / "one"), ranks[0]["whole"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_any_number_of_processes_goes_on_with_what_four_began(tmp_path: Path) -> None:
    ranks = check(4, 2, tmp_path)
    begun = sum(row["batch"] for row in ranks[0]["begun"].metrics)
    rows = sum(row["batch"] for row in ranks[0]["whole"].metrics)
    assert len(ranks[0]["begun"].metrics) == CUT
    for world, expert in ((4, 2), (4, 4), (2, 1), (2, 2), (1, 1)):
        folder = tmp_path / f"{world}-{expert}"
        folder.mkdir()
        runs = launch(world, RUNS + "resumed", folder, expert=expert) if world > 1 else [resumed(ALONE, folder)]
        assert_all_rows_once(runs, rows, begun)
        (assert_bitwise if (world, expert) == (4, 2) else assert_close)(runs[0], ranks[0]["whole"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_four_processes_go_on_with_what_one_began(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    run(ALONE, begun, CUT)
    (tmp_path / "alone").mkdir()
    expected = resumed(ALONE, tmp_path / "alone")
    for expert in (1, 2):
        assert_close(launch(4, RUNS + "resumed", tmp_path / str(expert), expert=expert)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("expert", [1, 2])
def test_what_is_recomputed_changes_nothing(tmp_path: Path, expert: int) -> None:
    kept, norms, block = launch(2, RUNS + "recomputed", tmp_path, expert=expert)[0]
    assert_bitwise(norms, kept)
    assert_bitwise(block, kept)
