"""Whole runs of the trainer in several processes, for `test_runs`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.train.distributed.cases import whole
from tests.train.small import PEAK, CountingRows, config, numbers
from torch import Tensor

from kvern.data.row_stream import Row
from kvern.train.checkpoint import Checkpoints
from kvern.train.mesh import Ranks
from kvern.train.metrics import Metrics, MetricsFile
from kvern.train.trainer import Trainer

STEPS, CUT = 5, 2
CHANGES: dict[str, Any] = {
    "batch": {"rows": 8, "length": 32, "micro_batch": 2, "ramp": {"first": 4, "tokens": 200}},
    "learning_rate": {"peak": 2.2e-4, "warmup_steps": 2, "constant_tokens": 200, "decay_tokens": 400},
}


class Recorded(CountingRows):
    """Rows that remember which of them were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def row(self, index: int) -> Row:
        self.asked.append(index)
        return super().row(index)


@dataclass(frozen=True)
class Run:
    """Where a run is: everything that training changes, whole; what its metrics say; the rows that this rank took."""

    state: dict[str, Tensor]
    metrics: list[dict[str, Any]]
    asked: list[int]


def run(ranks: Ranks, folder: Path, steps: int, **changes: Any) -> Run:
    """Begin in `folder`, or go on there, until `steps`."""
    checkpoints = Checkpoints(folder / "checkpoints", 3, ranks.is_first)
    rows = Recorded()
    trainer = Trainer(config(steps=steps, **{**CHANGES, **changes}), rows, ranks, checkpoints)
    trainer.resume()
    with Metrics([MetricsFile(folder / "metrics.jsonl")] if ranks.is_first else []) as metrics:
        trainer.run(metrics, PEAK)
    checkpoints.close()
    ranks.barrier()
    return Run(state(trainer), numbers(folder), rows.asked)


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters, buffers and moments by name."""
    found = {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}
    for name, parameter in trainer.model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{name}.{moment}"] = whole(trainer.optimizer.state[parameter][moment])
    return found


def interrupted(ranks: Ranks, folder: Path) -> dict[str, Run]:
    """A run at one go, and one in two parts, of which the first is kept."""
    found = {"whole": run(ranks, made(ranks, folder / "whole"), STEPS)}
    found["begun"] = run(ranks, made(ranks, folder / "cut"), CUT)
    copied(ranks, folder / "cut", folder / "begun")
    found["cut"] = run(ranks, folder / "cut", STEPS)
    return found


def resumed(ranks: Ranks, folder: Path) -> Run:
    """Go on with a copy of the run `begun`, which another number of ranks left there."""
    copied(ranks, folder.parent / "begun", folder / "run")
    return run(ranks, folder / "run", STEPS)


def recomputed(ranks: Ranks, folder: Path) -> list[Run]:
    """The same run with nothing, norms and whole blocks recomputed, and in FP8."""
    kinds: list[dict[str, Any]] = [{"recompute": {"activations": kind}} for kind in ("none", "norms", "block")]
    return [run(ranks, made(ranks, folder / str(index)), 2, **kind) for index, kind in enumerate(kinds)]


def made(ranks: Ranks, folder: Path) -> Path:
    """An empty folder for all."""
    if ranks.is_first:
        folder.mkdir()
    ranks.barrier()
    return folder


def copied(ranks: Ranks, source: Path, target: Path) -> None:
    """A copy for all."""
    ranks.barrier()
    if ranks.is_first:
        shutil.copytree(source, target)
    ranks.barrier()
