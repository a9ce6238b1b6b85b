"""`kvern train export`: from a run's folder to a checkpoint that serves, and begins a run again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import text_files
from tests.train.small import config, numbers, parameters, train, trainer

from kvern.checkpoint.load import load
from kvern.checkpoint.reader import CheckpointReader
from kvern.cli import main
from kvern.model import ForwardBatch
from kvern.train.checkpoint import complete
from kvern.train.run_folder import RunFolder, begin

TOKENS = [3, 4, 5, 6, 7]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints and a tokenizer."""
    folder = RunFolder(tmp_path / "run")
    settings = config(checkpoint={"every": 2})
    folder.tokenizer.mkdir(parents=True)
    for name, content in text_files().items():
        (folder.tokenizer / name).write_bytes(content)
    folder.config.write_text(settings.toml())
    train(trainer(settings, folder.path), folder.path)
    return folder.path


def test_a_run_becomes_a_checkpoint_and_begins_another_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "export", str(run), str(tmp_path / "out"), "--dtype", "f32"]) == 0
    assert "tensors" in capsys.readouterr().out
    model = load(tmp_path / "out", mtp=True)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == text_files()["tokenizer.json"]
    again = trainer(config(model={"folder": str(tmp_path / "out")}), tmp_path / "again")
    before = trainer(config(), run)
    assert before.resume()
    for name, tensor in parameters(before).items():
        assert torch.equal(parameters(again)[name], tensor), name
    with torch.no_grad():
        torch.testing.assert_close(model(ForwardBatch.of(TOKENS)), before.model(ForwardBatch.of(TOKENS)))
    train(again, tmp_path / "again")
    assert numbers(tmp_path / "again")[0]["loss"] < numbers(run)[-1]["loss"] + 0.5


def test_an_older_checkpoint_by_its_folder(run: Path, tmp_path: Path) -> None:
    oldest = complete(run / "checkpoints")[0]
    for name, source in (("old", oldest), ("new", run)):
        assert main(["train", "export", str(source), str(tmp_path / name), "--dtype", "bf16"]) == 0
    old, new = CheckpointReader(tmp_path / "old"), CheckpointReader(tmp_path / "new")
    assert not torch.equal(old.tensor("lm_head.weight"), new.tensor("lm_head.weight"))
    assert main(["train", "export", str(run), str(tmp_path / "old"), "--dtype", "bf16"]) == 1
    assert main(["train", "export", str(run), str(tmp_path / "old"), "--dtype", "bf16", "--force"]) == 0


def test_what_cannot_be_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = RunFolder(tmp_path / "empty")
    empty.path.mkdir()
    begin(empty, config(), resume=False)
    moved = complete(run / "checkpoints")[0].rename(tmp_path / "step-00000002")
    cases = [
        ([str(tmp_path / "nowhere"), "out", "--dtype", "f32"], 1, "neither the folder of a run nor a checkpoint"),
        ([str(empty.path), "out", "--dtype", "f32"], 1, "no complete checkpoint"),
        ([str(moved), "out", "--dtype", "f32"], 1, "does not lie in the folder of its run"),
        ([str(run), str(run / "out"), "--dtype", "f32"], 2, "lies in the folder of the run"),
        ([str(run), "out", "--dtype", "f32", "--ue8m0"], 2, "ue8m0 needs dtype fp8"),
    ]
    for arguments, code, message in cases:
        assert main(["train", "export", *arguments]) == code
        assert message in capsys.readouterr().err
