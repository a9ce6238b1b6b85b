"""`kvern train` from the command line: a run, a refusal, a kill, a run that goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from tests.train.small import MODEL, TIMES
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from kvern.cli import main
from kvern.train.checkpoint import complete, read_progress
from kvern.train.metrics import read

ROOT = Path(__file__).parents[2]
TEXT = "def add(left, right):\n    return left + right\n\n\n"


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """A configuration over two short files."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("one.py", "two.py"):
        (corpus / name).write_text("".join(TEXT.replace("add", f"{name[:3]}_{number}") for number in range(40)))
    tables: dict[str, Any] = {
        "steps": 3,
        "model": {**MODEL, "vocab_size": 262},
        "data": {"sources": [{"path": str(corpus)}]},
        "batch": {"rows": 2, "length": 64},
        "precision": {"dtype": "f32"},
        "learning_rate": {"peak": 1e-2, "warmup_steps": 1},
        "checkpoint": {"every": 3},
    }
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics without what the clock says."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read(run / "metrics.jsonl")]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint."""
    dcp_to_torch_save(complete(run / "checkpoints")[-1], run / "whole.pt")
    state: dict[str, torch.Tensor] = torch.load(run / "whole.pt")
    return state


def assert_same(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    first, second = tensors(one), tensors(other)
    assert len(first) > 100
    assert first.keys() == second.keys()
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []


def test_a_run_and_its_folder(settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "a"
    assert main(["train", str(settings), "--out", str(out), "--set", "seed=5"]) == 0
    assert "step 3/3  loss " in capsys.readouterr().err
    assert [row["step"] for row in rows(out)] == [1, 2, 3]
    assert rows(out)[2]["loss"] < rows(out)[0]["loss"]
    assert "seed = 5" in (out / "config.toml").read_text()
    assert [path.name for path in complete(out / "checkpoints")] == ["step-00000003"]
    assert json.loads((out / "checkpoints/step-00000003/progress.json").read_text())["tokens"] == 3 * 2 * 64
    assert (out / "tokenizer/tokenizer.json").exists()

    assert main(["train", str(settings), "--out", str(out), "--set", "seed=5"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["train", str(settings), "--out", str(out), "--resume", "auto", "--set", "batch.rows=4"]) == 2
    err = capsys.readouterr().err
    assert "batch.rows was 2 and is 4; seed was 5 and is 0" in err
    longer = ["--set", "seed=5", "--set", "steps=4"]
    assert main(["train", str(settings), "--out", str(out), "--resume", "auto", *longer]) == 0
    assert "going on after step 3, 384 tokens" in capsys.readouterr().err
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4]


def test_a_folder_with_anything_else_is_left_alone(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("important")
    assert main(["train", str(settings), "--out", str(tmp_path / "mine")]) == 2
    assert "is not empty: it holds thesis.txt" in capsys.readouterr().err
    assert (tmp_path / "mine/thesis.txt").read_text() == "important"


def test_a_run_that_was_killed_while_it_wrote_its_config_begins_again(settings: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml.part").write_text("seed =")
    assert main(["train", str(settings), "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run/config.toml.part").exists()


def test_it_says_what_there_is_to_learn_from_and_what_was_left_out(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus/empty.py").write_text("\n")
    (tmp_path / "corpus/packed.py").write_bytes(b"\x00\xff\xfe")
    argv = ["train", str(settings), "--out", str(tmp_path / "run"), "--set", "steps=1"]
    source = f"data.sources=[{{path={json.dumps(str(tmp_path / 'corpus'))}, skip=true}}]"
    for more in (["--set", source], ["--set", source, "--set", "steps=2", "--resume", "auto"]):
        assert main([*argv, *more]) == 0
        first = capsys.readouterr().err.splitlines()[0]
        assert first.startswith(f"{tmp_path / 'corpus'}: 2 documents, ")
        assert first.endswith(" tokens; left out: 1 binary, 1 empty")


def test_wrong_input_is_named(settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*overrides: str) -> str:
        flags = [part for override in overrides for part in ("--set", override)]
        code = main(["train", str(settings), "--out", str(tmp_path / "run"), *flags])
        assert code in (1, 2)
        return capsys.readouterr().err

    assert "did you mean batch.rows?" in fails("batch.rws=3")
    assert "batch.length is 65" in fails("batch.length=65")
    assert "the tokenizer has 262 tokens, and model.vocab_size is 200" in fails("model.vocab_size=200")
    assert not (tmp_path / "run/metrics.jsonl").exists()
    (tmp_path / "corpus/one.py").write_bytes(b"\x00\xff\xfe")
    assert "one.py" in fails()


def killed(settings: Path, out: Path, checkpoints: int, delay: float) -> int:
    """Train until there are so many more complete checkpoints and `delay` seconds later; returns the newest's step."""
    argv = [sys.executable, "-m", "kvern", "train", str(settings), "--threads", "1", "--out", str(out)]
    argv += ["--set", "steps=100000", "--set", "checkpoint.keep=1000", "--resume", "auto"]
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    wanted = len(complete(out / "checkpoints")) + checkpoints
    while len(complete(out / "checkpoints")) < wanted:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return read_progress(complete(out / "checkpoints")[-1]).step


def goes_on_bitwise(settings: Path, cut: Path, whole: Path, begun: int) -> None:
    """Whether a run that was killed after step `begun` ends as one that was not."""
    threads = torch.get_num_threads()
    for out, flags in ((cut, ["--resume", "auto"]), (whole, [])):
        steps = f"steps={begun + 3}"
        assert main(["train", str(settings), "--threads", "1", "--out", str(out), "--set", steps, *flags]) == 0
    torch.set_num_threads(threads)
    assert len(rows(cut)) == begun + 3
    assert_same(cut, whole)
    assert not list((cut / "checkpoints").glob("*.part"))


def test_killed_it_goes_on_bitwise(settings: Path, tmp_path: Path) -> None:
    begun = killed(settings, tmp_path / "cut", 1, 0.0)
    (tmp_path / "cut/checkpoints/step-99999999.part").mkdir()
    goes_on_bitwise(settings, tmp_path / "cut", tmp_path / "whole", begun)


@pytest.mark.slow
def test_killed_at_many_moments_it_goes_on_bitwise(settings: Path, tmp_path: Path) -> None:
    delays = random.Random(0)
    for _ in range(5):
        begun = killed(settings, tmp_path / "cut", 1, delays.uniform(0, 0.2))
    goes_on_bitwise(settings, tmp_path / "cut", tmp_path / "whole", begun)


@pytest.mark.slow
def test_the_smoke_run_finishes_and_learns(tmp_path: Path) -> None:
    """The guide's first run, over this Python's own library."""
    out, begin = tmp_path / "smoke", time.monotonic()
    assert main(["train", str(ROOT / "configs/nano-smoke.toml"), "--out", str(out)]) == 0
    assert time.monotonic() - begin < 180  # on two cores that do nothing else
    found = list(read(out / "metrics.jsonl"))
    assert [row["step"] for row in found] == list(range(1, 151))
    assert found[0]["loss"] > 5.5
    assert sum(row["loss"] for row in found[-15:]) / 15 < 2.7
    assert found[-1]["load_max_over_mean"]["worst"] < 2
    assert all(row["tokens_per_s"] > 0 and row["mfu"] > 0 for row in found)
