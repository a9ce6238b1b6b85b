"""The trainer on a card: the losses of a CPU, and runs that repeat and go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.small import PEAK, assert_equal, config, numbers, train, trainer

from kvern.train.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PRECISIONS: dict[str, tuple[dict[str, Any], float]] = {
    "f32": ({"dtype": "f32"}, 1e-3),
    "bf16": ({"dtype": "bf16"}, 2e-2),
    "fp8": ({"dtype": "bf16", "fp8": "blockwise"}, 4e-2),
}
"""The table of a config, and how far losses may lie from a CPU's after some steps."""


def finished(folder: Path, device: str, **changes: Any) -> Trainer:
    folder.mkdir()
    run = trainer(config(**changes), folder, device)
    train(run, folder)
    return run


@pytest.mark.parametrize("name", PRECISIONS)
def test_losses_are_those_of_a_cpu(tmp_path: Path, name: str) -> None:
    precision, tolerance = PRECISIONS[name]
    rows = {}
    for device in ("cpu", "cuda"):
        finished(tmp_path / device, device, steps=8, precision=precision)
        rows[device] = numbers(tmp_path / device)
    assert rows["cuda"][-1]["loss"] < 0.9 * rows["cuda"][0]["loss"]
    for got, expected in zip(rows["cuda"], rows["cpu"], strict=True):
        for key in ("loss", "mtp_loss"):
            assert got[key] == pytest.approx(expected[key], rel=tolerance), (got["step"], key)


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_run_repeats_and_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    precision, _ = PRECISIONS[name]
    whole = finished(tmp_path / "whole", "cuda", steps=4, precision=precision)
    assert_equal(whole, finished(tmp_path / "again", "cuda", steps=4, precision=precision))
    cut = tmp_path / "cut"
    cut.mkdir()
    stop_after(trainer(config(steps=4, precision=precision), cut, "cuda"), 2)
    later = trainer(config(steps=4, precision=precision), cut, "cuda")
    assert later.resume()
    train(later, cut)
    assert_equal(whole, later)


def stop_after(run: Trainer, step: int) -> None:
    """Train so far, save, and leave the rest undone."""
    while run.progress.step < step:
        run.step(PEAK)
    run.save()
    run.checkpoints.wait()
    run.checkpoints.close()
