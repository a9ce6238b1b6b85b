"""The loop: the same numbers however the work is cut, stopped or begun again, and a good end when numbers go bad."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.small import (
    LENGTH,
    MODEL,
    PEAK,
    CountingRows,
    assert_equal,
    config,
    numbers,
    parameters,
    train,
    trainer,
)
from torch import nn

from kvern.checkpoint.load import load
from kvern.data.row_stream import Row
from kvern.errors import ConfigError, TrainingError
from kvern.train.checkpoint import complete
from kvern.train.experts import checkpoint_state
from kvern.train.metrics import Metrics, MetricsFile, ProgressLine, Sink, StepMetrics
from kvern.train.step import StepResult, StepSettings
from kvern.train.stopping import Stopping
from kvern.train.trainer import Trainer


def finished(folder: Path, **changes: Any) -> Trainer:
    """A run to its end, in a folder of its own."""
    folder.mkdir()
    run = trainer(config(**changes), folder)
    train(run, folder)
    return run


def test_a_model_learns_to_count(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", steps=20)
    rows = numbers(tmp_path / "run")
    assert rows[0]["loss"] > 4
    assert rows[-1]["loss"] < 1.2
    assert rows[-1]["mtp_loss"] < 0.5 * rows[0]["mtp_loss"]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["tokens"] == 20 * 4 * LENGTH
    assert rows[0]["lr"] == pytest.approx(0.5e-2)
    assert 1 <= rows[0]["load_max_over_mean"]["mean"] <= rows[0]["load_max_over_mean"]["worst"] <= 4
    assert run.progress.consumed == 80


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    assert_equal(finished(tmp_path / "one"), finished(tmp_path / "other"))
    assert numbers(tmp_path / "one") == numbers(tmp_path / "other")
    finished(tmp_path / "third", seed=1)
    assert numbers(tmp_path / "one") != numbers(tmp_path / "third")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_micro_batches_change_nothing_but_rounding(tmp_path: Path, dtype: str) -> None:
    """Rows of unequal targets, so that a mean of means would be wrong."""
    results = []
    for size in (1, 3, 4):
        folder = tmp_path / str(size)
        batch = {"rows": 4, "length": LENGTH, "micro_batch": size}
        loss = {"balance": 0.1}
        run = trainer(config(steps=2, batch=batch, loss=loss, precision={"dtype": dtype}), folder)
        run.rows = UnevenRows()
        train(run, folder)
        results.append((numbers(folder), parameters(run)))
    tolerance = 1e-5 if dtype == "f32" else 2e-2
    for rows, weights in results[1:]:
        for row, expected in zip(rows, results[0][0], strict=True):
            for key in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
                assert row[key] == pytest.approx(expected[key], rel=tolerance), key
        if dtype == "f32":
            for name, weight in results[0][1].items():
                torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-4, msg=name)


class UnevenRows(CountingRows):
    def row(self, index: int) -> Row:
        whole = super().row(index)
        kept = 6 + 7 * (index % 4)
        return Row(whole.tokens[:kept], (kept - 3, 3), None)


def test_batches_grow_by_tokens(tmp_path: Path) -> None:
    batch = {"rows": 6, "length": LENGTH, "micro_batch": 4, "ramp": {"first": 2, "tokens": 10 * LENGTH}}
    finished(tmp_path / "run", steps=6, batch=batch)
    rows = numbers(tmp_path / "run")
    assert [row["batch"] for row in rows] == [2, 2, 2, 4, 6, 6]
    assert rows[-1]["tokens"] == 22 * LENGTH


def test_a_run_ends_by_tokens(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", steps=None, tokens=300)
    assert (run.progress.step, run.progress.tokens) == (3, 384)


def test_young_runs_see_short_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [{"rows": 3, "length": 5}, {"rows": 4, "length": 16}]
    run = trainer(config(batch={"rows": 2, "length": LENGTH, "windows": windows}), tmp_path / "run")
    step = run.learner.step
    lengths: list[tuple[int, ...]] = []

    def spy(rows: Sequence[Row], batch: int, settings: StepSettings) -> StepResult:
        lengths.extend(row.lengths for row in rows)
        return step(rows, batch, settings)

    monkeypatch.setattr(run.learner, "step", spy)
    for _ in range(3):
        run.step(PEAK)
    short = (5, 5, 5, 5, 5, 5, 2)
    assert lengths == [short, short, short, (16, 4, 12), (20, 12), (20, 12)]


@pytest.mark.parametrize(("cut", "optimizer"), [(1, "adamw"), (3, "adamw"), (3, "muon")])
def test_a_run_that_goes_on_is_bitwise_the_whole_run(tmp_path: Path, cut: int, optimizer: str) -> None:
    changes: dict[str, Any] = {
        "optimizer": {"name": optimizer},
        "precision": {"dtype": "bf16", "fp8": "blockwise"},
        "batch": {"rows": 6, "length": LENGTH, "ramp": {"first": 2, "tokens": 200}},
        "learning_rate": {"peak": 1e-2, "warmup_steps": 2, "constant_tokens": 200, "decay_tokens": 400},
    }
    whole = finished(tmp_path / "whole", steps=5, **changes)
    begun = finished(tmp_path / "cut", steps=cut, **changes)
    resumed = trainer(config(steps=5, **changes), tmp_path / "cut")
    assert resumed.resume()
    assert_equal(begun, resumed)
    train(resumed, tmp_path / "cut")
    assert_equal(whole, resumed)
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")
    for name, parameter in whole.model.named_parameters():
        other = dict(resumed.model.named_parameters())[name]
        one, two = whole.optimizer.state[parameter], resumed.optimizer.state[other]
        assert one["step"] == two["step"] == 5
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one.keys() - {"step"})


def test_other_data_or_another_configuration_is_noticed(tmp_path: Path) -> None:
    finished(tmp_path / "run", steps=1)
    run = trainer(config(seed=3), tmp_path / "run")
    with pytest.raises(ConfigError, match="of another configuration"):
        run.resume()
    other = CountingRows()
    other.fingerprint = "other"
    run = trainer(config(), tmp_path / "run")
    changed = Trainer(config(), other, run.ranks, run.checkpoints)
    with pytest.raises(ConfigError, match="the data is not what this run was begun with"):
        changed.resume()


def test_a_loss_that_is_not_finite_stops_and_names_the_module(tmp_path: Path) -> None:
    finished(tmp_path / "run", steps=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run/checkpoints/step-00000001").iterdir()}
    run = trainer(config(steps=3), tmp_path / "run")
    run.resume()
    broken = run.model.model.layers[1].mlp.shared_experts  # type: ignore[union-attr]
    assert isinstance(broken, nn.Module)
    handle = broken.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    with pytest.raises(TrainingError) as caught:
        train(run, tmp_path / "run")
    handle.remove()
    assert "step 2: the loss is not finite" in caught.value.message
    assert "model.layers.1.mlp.shared_experts" in caught.value.message
    assert "step-00000001 is the last good checkpoint" in (caught.value.hint or "")
    assert {path.name: path.read_bytes() for path in complete(tmp_path / "run/checkpoints")[0].iterdir()} == before
    assert [row["step"] for row in numbers(tmp_path / "run")] == [1]


def test_a_gradient_that_is_not_finite_names_the_parameter(tmp_path: Path) -> None:
    run = trainer(config(), tmp_path)
    before = parameters(run)
    weight = run.model.model.layers[0].self_attn.o_proj.weight  # type: ignore[union-attr]
    assert isinstance(weight, nn.Parameter)
    weight.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[no-untyped-call]
    with pytest.raises(TrainingError, match=r"step 1: .*model\.layers\.0\.self_attn\.o_proj\.weight"):
        run.step(PEAK)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters(run).items())


def test_rows_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    run = trainer(config(model={**MODEL, "vocab_size": 50}), tmp_path)
    with pytest.raises(ConfigError, match=r"has token 52, and model.vocab_size is 50"):
        train(run, tmp_path)
    run = trainer(config(batch={"rows": 4, "length": 8}), tmp_path)
    with pytest.raises(ConfigError, match=r"row 0 has 32 tokens, over batch.length, which is 8"):
        train(run, tmp_path)


class Stopper(ProgressLine):
    """Sends a signal when a step has been reported."""

    def write(self, row: StepMetrics) -> None:
        if row.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # make's own, and the one that it hands on


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path: Path) -> None:
    whole = finished(tmp_path / "whole", steps=4)
    (tmp_path / "run").mkdir()
    run = trainer(config(steps=4), tmp_path / "run")
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    sinks: list[Sink] = [MetricsFile(tmp_path / "run/metrics.jsonl"), Stopper(4, None, "")]
    with Stopping() as stopping, Metrics(sinks) as metrics:
        outcome = run.run(metrics, PEAK, stopping)
    run.checkpoints.close()
    assert (outcome.signal, outcome.progress.step) == (signal.SIGTERM, 2)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    resumed = trainer(config(steps=4), tmp_path / "run")
    assert resumed.resume()
    train(resumed, tmp_path / "run")
    assert_equal(whole, resumed)
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "run")


def test_a_run_may_begin_from_a_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    stored = load(tiny_folder, dtype=torch.float32, mtp=True).state_dict()
    run = trainer(config(model={"folder": str(tiny_folder)}, batch={"rows": 2, "length": LENGTH}), tmp_path)
    begun = checkpoint_state(run.model)
    assert begun.keys() == stored.keys()
    assert all(torch.equal(begun[name], tensor) for name, tensor in stored.items())
    assert run.step(PEAK).loss < 20
    changed = checkpoint_state(run.model)
    assert not any(torch.equal(changed[name], stored[name]) for name in ("lm_head.weight", "model.norm.weight"))
