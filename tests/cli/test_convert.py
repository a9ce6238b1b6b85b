"""`kvern convert`: what it prints where, and that its options reach the conversion."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.checkpoint.layout import random_tensors, tiny_config, write_folder

from kvern.checkpoint.convert import plan_conversion
from kvern.checkpoint.gqa import ImportCost
from kvern.checkpoint.reader import CheckpointReader
from kvern.cli import convert as command
from kvern.config import Int4Config, QuantizationConfig
from kvern.errors import CheckpointError, NotFoundError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source"), tiny_config(), random_tensors(tiny_config()))


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


def test_converts_and_says_what_it_wrote(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(source), str(tmp_path / "out"), "--dtype", "fp8", "--head-fp8", "--ue8m0") == 0
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'out'}: 241 tensors" in out
    assert "in 3 files" in out
    assert "(100 %)" in err
    reader = CheckpointReader(tmp_path / "out")
    assert reader.spec("lm_head.weight").dtype is torch.float8_e4m3fn
    assert isinstance(reader.config.quantization_config, QuantizationConfig)
    assert reader.config.quantization_config.scale_fmt == "ue8m0"


def test_force_starts_again(source: Path, tmp_path: Path) -> None:
    run(str(source), str(tmp_path / "out"), "--dtype", "fp8")
    with pytest.raises(CheckpointError, match="another dtype than bf16"):
        run(str(source), str(tmp_path / "out"), "--dtype", "bf16")
    run(str(source), str(tmp_path / "out"), "--dtype", "bf16", "--force")
    assert CheckpointReader(tmp_path / "out").config.quantization_config is None


def test_a_known_model_must_have_been_pulled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match=r"coder-0\.5b has not been pulled") as caught:
        run("coder-0.5b", "out")
    assert caught.value.hint == "run `kvern pull coder-0.5b`"


def test_an_unknown_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no-such-model: no such file or folder"):
        run("no-such-model", str(tmp_path / "out"))


def test_the_cost_of_an_import_is_printed(source: Path) -> None:
    planned = replace(plan_conversion(source), cost=ImportCost(1_000_000_000, 1_080_000_000))
    lines = "\n".join(command.summary(planned, Path("out"), 1.0))
    assert "1.00 GB" in lines
    assert "1.08 GB" in lines
    assert "1.08x" in lines


def test_four_bits_and_their_group_reach_the_conversion(source: Path, tmp_path: Path) -> None:
    assert run(str(source), str(tmp_path / "out"), "--dtype", "int4", "--group-size", "32", "--head-fp8") == 0
    quantization = CheckpointReader(tmp_path / "out").config.quantization_config
    assert isinstance(quantization, Int4Config)
    assert quantization.group_size == 32
    assert quantization.is_fp8("lm_head")
    with pytest.raises(SystemExit):
        run(str(source), str(tmp_path / "other"), "--dtype", "int4", "--group-size", "64")
