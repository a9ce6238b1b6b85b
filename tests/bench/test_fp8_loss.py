"""bench.fp8_loss: the arithmetic by hand, and whole studies of a tiny model, cut and begun again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from bench.fp8_loss import AGAIN, COMPARED, CONFIG, REFERENCE, Run, Study, parser, run
from bench.loss_difference import Curve, compare, plot, table
from tests.train.small import MODEL

from bench import fp8_loss
from kvern.errors import CheckpointError, ConfigError
from kvern.model import Transformer
from kvern.ops import Fp8Recipe
from kvern.train.config import load
from kvern.train.metrics import MetricsFile, StepMetrics, read
from kvern.train.model import Fp8Linear, make_trainable

STEPS, STEP_TOKENS, OPENING = 6, 128, 2


def curve(loss: list[float], total: int = 40, sizes: int = 1) -> Curve:
    """A run of one loss a step, `sizes` tokens each."""
    return Curve(total, np.arange(1, len(loss) + 1) * sizes, np.array(loss), 100.0)


def test_differences_by_hand() -> None:
    reference = curve([9.0] * 36 + [2.0, 2.0, 2.0, 2.0])
    worse, better = curve([1.0] * 36 + [2.0, 2.0, 2.0, 2.04]), curve([9.0] * 36 + [1.99, 1.99, 2.0, 2.0])
    rows = compare({("bf16", 0): reference, ("bf16", 7): reference, ("x", 0): worse, ("x", 7): better}, "bf16")
    assert [row.variant for row in rows] == ["bf16", "x"]
    assert rows[0].losses == {0: 2.0, 7: 2.0}
    assert rows[0].differences == {}
    assert rows[1].differences == {0: pytest.approx(0.005), 7: pytest.approx(-0.0025)}
    assert rows[1].mean == pytest.approx(0.00125)
    assert rows[1].within_bar
    alone = compare({("bf16", 0): reference, ("x", 0): better}, "bf16")[1]
    assert alone.within_bar is (abs(alone.mean or 0) < 0.0025)
    much_better = compare({("bf16", 0): reference, ("x", 0): curve([1.0] * 40)}, "bf16")[1]
    assert much_better.mean == pytest.approx(-0.5)
    assert much_better.within_bar is False


def test_the_mean_weighs_steps_by_their_tokens() -> None:
    uneven = Curve(100, np.array([90, 91, 100]), np.array([5.0, 1.0, 2.0]), 1.0)
    assert uneven.last_mean() == pytest.approx((1 * 1.0 + 9 * 2.0) / 10)


def test_a_cut_run_has_no_difference_yet() -> None:
    whole, cut = curve([2.0] * 40), curve([2.0] * 30)
    rows = compare({("bf16", 0): whole, ("bf16", 1): whole, ("x", 0): whole, ("x", 1): cut}, "bf16")
    assert rows[1].differences == {0: 0.0}
    assert (rows[1].mean, rows[1].within_bar, rows[1].trained) == (None, None, 0.875)
    text = list(table(rows, (0, 1)))
    assert len({len(line) for line in text}) == 1
    assert text[2].split() == ["x", "88%", "2.0000", "-", "+0.000%", "-", "-", "-", "100"]
    assert list(table(rows, (0, 1), markdown=True))[1].count("---") == 9


def test_runs_over_other_tokens_are_not_compared() -> None:
    one, other = curve([2.0] * 20, sizes=2), curve([2.0] * 40, sizes=1)
    with pytest.raises(CheckpointError, match="different numbers of tokens after step 1"):
        compare({("bf16", 0): one, ("x", 0): other}, "bf16")


def test_curves_of_nothing_and_of_little_are_drawn(tmp_path: Path) -> None:
    nothing = Curve.read(tmp_path / "metrics.jsonl", 40)
    assert (nothing.trained, nothing.is_complete) == (0, False)
    runs = {("bf16", 0): curve([2.0]), ("bf16", 1): nothing, ("x", 0): curve([2.0] * 3), ("x", 1): nothing}
    plot(runs, "bf16", tmp_path / "few.png")
    plot({("bf16", 0): nothing, ("x", 0): nothing}, "bf16", tmp_path / "none.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("few.png", "none.png"))


def test_the_studys_configuration_has_whole_blocks() -> None:
    config = load(CONFIG)
    assert config.tokens is not None
    assert config.tokens >= 1_200_000
    model = Transformer(config.architecture(), device="meta")
    make_trainable(model, Fp8Recipe())
    shapes = {
        name: m.weight.shape for name, m in model.named_modules() if isinstance(m, Fp8Linear) and m.weight is not None
    }
    ragged = {name.rpartition(".")[2] for name, shape in shapes.items() if any(size % 128 for size in shape)}
    assert ragged == {"kv_a_proj_with_mqa"}
    assert len(shapes) > 30
    assert (config.batch.micro_batch // 2) * config.batch.length % 128 == 0


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A configuration whose runs take a fraction of a second, on one thread."""
    (tmp_path / "corpus").mkdir()
    lines = "".join(f"def f{n}(x):\n    return x + {n * n}\n\n" for n in range(200))
    (tmp_path / "corpus/code.py").write_text(lines)
    raw: dict[str, Any] = {
        "tokens": STEPS * STEP_TOKENS,
        "model": {**MODEL, "vocab_size": 320, "initializer_range": 0.1},
        "data": {"sources": [{"path": str(tmp_path / "corpus")}]},
        "batch": {"rows": 4, "length": 32, "micro_batch": 4},
        "learning_rate": {"peak": 1e-2, "low": 1e-2, "last": 1e-2, "warmup_steps": 2},
        "metrics": {"tensorboard": "off"},
    }
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(raw))
    monkeypatch.setattr(fp8_loss, "OPENING_STEPS", OPENING)
    threads = torch.get_num_threads()
    yield path
    torch.set_num_threads(threads)


def arguments(config: Path, *more: str) -> Any:
    work = str(config.parent / "study")
    return parser().parse_args(["--config", str(config), "--work", work, "--seeds", "3", "--threads", "1", *more])


def losses(study: Study, run: Run) -> list[float]:
    return [row["loss"] for row in read(study.folder(run).metrics)]


def test_a_study_is_estimated_cut_and_finished(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(arguments(tiny, "--estimate")) == 0
    assert "left for the study: until " in capsys.readouterr().err

    write = MetricsFile.write

    def write_and_stop(self: MetricsFile, row: StepMetrics) -> None:
        write(self, row)
        if row.step == STEPS - 1 and "fp8-blockwise" in self._file.name:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsFile, "write", write_and_stop)
    assert run(arguments(tiny)) == 128 + signal.SIGTERM
    captured = capsys.readouterr()
    shares = [line.split()[:2] for line in captured.out.splitlines()[1:5]]
    assert shares == [["bf16", "100%"], ["fp8-blockwise", "83%"], ["bf16-again", "33%"], ["fp8-tensorwise", "33%"]]
    assert "not measured yet" in captured.out
    assert "stopped: the same command goes on" in captured.err
    monkeypatch.setattr(MetricsFile, "write", write)

    assert run(arguments(tiny)) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in out[1:5]] == [[name, "100%"] for name in (REFERENCE, *COMPARED)]
    assert out[-2].startswith("fp8-blockwise: ")
    assert "bar of 0.25%; noise floor: " in out[-1]

    study = Study(tiny, tiny.parent / "study", (3,))
    assert (study.work / "fp8-loss.png").read_bytes().startswith(b"\x89PNG")
    configs = {one.variant: load(study.folder(one).config) for one in study.order()}
    seen = {name: (one.seed, one.precision.fp8, one.batch.micro_batch) for name, one in configs.items()}
    assert seen == {
        "bf16": (3, "none", 4),
        "fp8-blockwise": (3, "blockwise", 4),
        "bf16-again": (3, "none", 2),
        "fp8-tensorwise": (3, "tensorwise", 4),
    }
    before = {one.name: study.folder(one).metrics.read_text() for one in study.order()}
    assert run(arguments(tiny, "--json")) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["complete"]
    assert "run 1" not in captured.err
    assert {one.name: study.folder(one).metrics.read_text() for one in study.order()} == before
    means = {row["variant"]: row["mean"] for row in facts["rows"]}
    assert means[REFERENCE] is None
    assert 0 < abs(means["fp8-blockwise"]) < 0.05
    with pytest.raises(ConfigError, match="begun with another configuration"):
        run(arguments(tiny, "--set", "learning_rate.peak=2e-2"))

    whole = Study(tiny, tiny.parent / "whole", (3,), threads=1)  # in one go: cuts change nothing
    for variant in ("fp8-blockwise", AGAIN):
        assert whole.train(Run(variant, 3), whole.total) == 0
        assert losses(whole, Run(variant, 3)) == losses(study, Run(variant, 3))
    again, reference = losses(study, Run(AGAIN, 3)), losses(study, Run(REFERENCE, 3))
    assert again != reference
    assert again == pytest.approx(reference, rel=0.01)


def test_pairs_come_first() -> None:
    names = [one.name for one in Study(CONFIG, Path("nowhere"), (0, 1)).order()]
    assert names[:4] == ["bf16-seed0", "fp8-blockwise-seed0", "bf16-seed1", "fp8-blockwise-seed1"]
    assert names[4:] == ["bf16-again-seed0", "bf16-again-seed1", "fp8-tensorwise-seed0", "fp8-tensorwise-seed1"]
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("batch.micro_batch=1", "halving it"),
        ("precision.fp8=blockwise", "without fp8"),
        ("precision.dtype=f32", "BF16"),
        ("model.hiden_size=8", "hiden_size"),
    ],
)
def test_configurations_that_are_no_study(tiny: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Study(tiny, tiny.parent / "study", (0, 1), [change])


def test_a_seed_twice_and_a_length_in_steps(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(tiny, "--seeds", "1,1")
    assert "names a seed twice" in capsys.readouterr().err
    tiny.write_text(tiny.read_text().replace(f"tokens = {STEPS * STEP_TOKENS}", "steps = 3"))
    with pytest.raises(ConfigError, match="tokens, not steps"):
        Study(tiny, tiny.parent / "study", (0, 1))
