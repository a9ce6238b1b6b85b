"""What a run writes about itself, and what is drawn and counted from it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tests.train.small import config

from kvern.cli import main
from kvern.config import ModelConfig
from kvern.errors import CheckpointError, ConfigError
from kvern.model import ForwardBatch, Transformer
from kvern.model.linear import Linear
from kvern.plan.flops import active_weights, step_flops
from kvern.train.metrics import Metrics, MetricsFile, ProgressLine, StepMetrics, keep_until, read, tensorboard
from kvern.train.peak import peak


def row(step: int, loss: float = 3.0) -> StepMetrics:
    return StepMetrics(
        step=step,
        tokens=1000 * step,
        loss=loss,
        mtp_loss=2.0,
        balance_loss=1e-4,
        lr=1e-3,
        grad_norm=0.5,
        load_max_over_mean={"worst": 2.5, "mean": 1.5},
        batch=8,
        seconds=0.5,
        tokens_per_s=2000.0,
        mfu=0.25,
    )


def test_a_line_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics([MetricsFile(path)]) as metrics:
        for step in (1, 2, 3):
            metrics.write(row(step))
    rows = list(read(path))
    assert [one["step"] for one in rows] == [1, 2, 3]
    assert set(rows[0]) == {
        *("step", "tokens", "loss", "mtp_loss", "balance_loss", "lr", "grad_norm", "tokens_per_s", "mfu"),
        *("load_max_over_mean", "batch", "seconds"),
    }


def test_lines_after_a_checkpoint_are_dropped_whole_or_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    keep_until(path, 2)
    assert not path.exists()
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    keep_until(path, 2)
    assert [one["step"] for one in read(path)] == [1, 2]
    path.write_text('{"step": 1}\nnothing\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match="line 2 is no row of metrics"):
        list(read(path))


def test_the_progress_line_tells_speed_and_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressLine(100, None, "measured")
    progress.write(row(1))
    progress.write(row(2))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "share of peak: measured"
    assert second.startswith("step 1/100  loss 3.000  mtp 2.000  load 2.50  lr 1.00e-03  norm 0.50  1.0K tokens, ")
    assert second.endswith("2.0K/s, 25.0 % of peak  0m50s left")  # 99 steps of 0.5 s
    assert ProgressLine(None, 7_202_000, "").line(row(2)).startswith("step 2  ")


def test_tensorboard_where_it_is_installed(tmp_path: Path) -> None:
    assert tensorboard(tmp_path / "none", "off") == []
    if importlib.util.find_spec("tensorboard") is None:
        assert tensorboard(tmp_path / "none", "auto") == []
        with pytest.raises(ConfigError, match="TensorBoard is not installed"):
            tensorboard(tmp_path / "none", "on")
        return
    with Metrics(tensorboard(tmp_path / "some", "auto")) as metrics:
        metrics.write(row(1))
    assert list((tmp_path / "some").glob("events.*"))


def test_runs_are_drawn_over_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("one", 500), ("two", 3)):
        (tmp_path / name).mkdir()
        with Metrics([MetricsFile(tmp_path / name / "metrics.jsonl")]) as metrics:
            for step in range(1, count + 1):
                metrics.write(row(step, 3.0 / step))
    both = tmp_path / "both.png"
    assert main(["train", "plot", str(tmp_path / "one"), str(tmp_path / "two"), "--png", str(both)]) == 0
    assert both.read_bytes().startswith(b"\x89PNG")
    assert main(["train", "plot", str(tmp_path / "two")]) == 0
    assert (tmp_path / "two/plot.png").exists()
    assert capsys.readouterr().out == f"{both}\n{tmp_path}/two/plot.png\n"
    assert main(["train", "plot", str(tmp_path / "three")]) == 1
    assert "metrics.jsonl: cannot be read" in capsys.readouterr().err
    assert main(["train", "plot", str(tmp_path / "two"), "--png", str(tmp_path / "x.jpg")]) == 2
    (tmp_path / "four").mkdir()
    (tmp_path / "four/metrics.jsonl").write_text("")
    assert main(["train", "plot", str(tmp_path / "four")]) == 1


def test_flops_are_those_of_every_product_that_runs() -> None:
    settings = config().architecture()
    model, counted = Transformer(settings, device="cpu"), 0

    def count(module: Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal counted
        counted += output.numel() * module.inputs

    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    for module in model.modules():
        if isinstance(module, Linear):
            module.register_forward_hook(count)
    tokens = 10
    batch = ForwardBatch.of(list(range(tokens)))
    hidden = model.hidden(batch)
    model.logits(hidden)
    model.mtp(hidden, batch)
    assert settings.n_routed_experts is not None
    gates = 2 * settings.hidden_size * settings.n_routed_experts * tokens
    assert counted + gates == active_weights(settings) * tokens
    pairs = tokens * (tokens + 1) // 2
    attention = 3 * 2 * (16 + 8) * pairs  # layers, heads, sizes of query and value
    assert step_flops(settings, tokens, pairs) == 6 * (active_weights(settings) * tokens + attention)


def test_the_known_model_has_its_active_weights() -> None:
    settings = ModelConfig.named("deepseek-v3")
    head = settings.hidden_size * settings.vocab_size
    mtp = active_weights(settings) - 36_626_000_000
    assert mtp == pytest.approx(head + 2 * settings.hidden_size**2 + 0.187e9 + 9 * 44_040_192, rel=0.02)


def test_the_peak_is_measured_here() -> None:
    found = peak(torch.device("cpu"), torch.float32)
    assert found.flops > 1e8
    assert found.source == "measured: a product of 1024 x 1024 in float32"
