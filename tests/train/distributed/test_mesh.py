"""Ranks: alone, and several over gloo; arrangements that cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tests.train.distributed.launch import launch

from kvern.errors import ConfigError, TrainingError
from kvern.train.mesh import MeshOptions, Ranks, start


def test_a_process_without_torchrun_is_alone() -> None:
    ranks = start(environment={})
    assert (ranks.rank, ranks.world, ranks.data_rank, ranks.data_size, ranks.mesh) == (0, 1, 0, 1, None)
    assert ranks.is_first
    counts = torch.tensor([3, 4])
    ranks.sum(counts)
    ranks.barrier()
    ranks.close()
    assert counts.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("environment", "expert", "words"),
    [
        ({"WORLD_SIZE": "6"}, 4, "6 ranks cannot be cut into sets of 4"),
        ({}, 2, "1 ranks cannot be cut into sets of 2"),
        ({}, 0, "0 ranks cannot share experts"),
        ({"WORLD_SIZE": "two"}, 1, "WORLD_SIZE is 'two'"),
    ],
)
def test_an_arrangement_that_cannot_be_is_refused_with_its_numbers(
    environment: dict[str, str], expert: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        start(MeshOptions(expert=expert), environment)


def test_no_patience_is_refused() -> None:
    with pytest.raises(ConfigError, match="nobody waits 0"):
        MeshOptions(timeout_minutes=0)


def test_ranks_that_do_not_find_each_other_say_where(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=r"do not find each other at 127\.0\.0\.1:9"):
        start(MeshOptions(timeout_minutes=0.01))


def who(ranks: Ranks, folder: Path) -> tuple[int, int, int, list[int], list[int]]:
    """A rank's number, what a sum gives, and whom it shares what with."""
    counts = torch.tensor([ranks.rank, 10])
    ranks.sum(counts)
    assert ranks.mesh is not None
    data, expert = (ranks.mesh[name].mesh.tolist() for name in ("data", "expert"))
    return ranks.rank, int(counts[0]), int(counts[1]), data, expert


def test_ranks_add_up_and_lie_in_a_grid(tmp_path: Path) -> None:
    assert launch(2, "tests.train.distributed.test_mesh:who", tmp_path, expert=2) == [
        (0, 1, 20, [0], [0, 1]),
        (1, 1, 20, [1], [0, 1]),
    ]


@pytest.mark.slow
def test_the_experts_dimension_is_the_inner_one(tmp_path: Path) -> None:
    assert launch(4, "tests.train.distributed.test_mesh:who", tmp_path, expert=2) == [
        (0, 6, 40, [0, 2], [0, 1]),
        (1, 6, 40, [1, 3], [0, 1]),
        (2, 6, 40, [0, 2], [2, 3]),
        (3, 6, 40, [1, 3], [2, 3]),
    ]


def leave(ranks: Ranks, folder: Path) -> tuple[str, str | None]:
    """One rank dies; the other says what it misses."""
    if ranks.rank == 1:
        torch.save(None, folder / "1.pt")
        os._exit(0)
    with pytest.raises(TrainingError) as caught:
        ranks.barrier()
    torch.save((caught.value.message, caught.value.hint), folder / "0.pt")
    os._exit(0)


def test_a_rank_without_the_others_says_so(tmp_path: Path) -> None:
    message, hint = launch(2, "tests.train.distributed.test_mesh:leave", tmp_path)[0]
    assert message.startswith("rank 0 has lost the other ranks: ")
    assert "the first error of another rank" in hint
