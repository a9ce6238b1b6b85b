"""A run that takes a fraction of a second: a tiny model, and rows that count upward modulo the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.tiny import TINY

from kvern.data.row_stream import Row
from kvern.train.checkpoint import Checkpoints
from kvern.train.config import TrainConfig, parse
from kvern.train.mesh import Ranks
from kvern.train.metrics import Metrics, MetricsFile, read
from kvern.train.peak import Peak
from kvern.train.trainer import Outcome, Trainer

LENGTH, VOCABULARY = 32, 64
MODEL: dict[str, Any] = {
    **TINY,
    "vocab_size": VOCABULARY,
    "q_lora_rank": 16,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
PEAK = Peak(1e12, "made up")
TIMES = ("seconds", "tokens_per_s", "mfu")


class CountingRows:
    """Row i counts from 7 i, in two documents."""

    fingerprint = "counting"

    def row(self, index: int) -> Row:
        return Row((np.arange(LENGTH) + 7 * index) % VOCABULARY, (LENGTH - 12, 12), None)


def raw(**changes: Any) -> dict[str, Any]:
    """The parsed file; `changes` replace whole tables."""
    tables: dict[str, Any] = {
        "steps": 4,
        "model": MODEL,
        "data": {"sources": [{"path": "corpus"}]},
        "batch": {"rows": 4, "length": LENGTH, "micro_batch": 2},
        "precision": {"dtype": "f32"},
        "learning_rate": {"peak": 1e-2, "warmup_steps": 2},
    }
    return {**tables, **changes}


def config(**changes: Any) -> TrainConfig:
    return parse(raw(**changes))


def trainer(settings: TrainConfig, folder: Path, device: str = "cpu") -> Trainer:
    checkpoints = Checkpoints(folder / "checkpoints", settings.checkpoint.keep)
    return Trainer(settings, CountingRows(), Ranks(0, 1, torch.device(device)), checkpoints)


def train(run: Trainer, folder: Path) -> Outcome:
    with Metrics([MetricsFile(folder / "metrics.jsonl")]) as metrics:
        outcome = run.run(metrics, PEAK)
    run.checkpoints.close()
    return outcome


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what the clock says."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read(folder / "metrics.jsonl")]


def parameters(run: Trainer) -> dict[str, torch.Tensor]:
    named = {name: tensor.detach().clone() for name, tensor in run.model.named_parameters()}
    return named | {name: buffer.clone() for name, buffer in run.model.named_buffers()}


def assert_equal(one: Trainer, other: Trainer) -> None:
    """Every parameter and every bias, bit for bit."""
    expected, got = parameters(one), parameters(other)
    assert expected.keys() == got.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, got[name])] == []
