"""Drafts from a folder on: on by default, by the MTP layer where the checkpoint has one; texts stay the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.tiny import text_files

from kvern.checkpoint.save import save_model
from kvern.config import ModelConfig
from kvern.engine import EngineSettings
from kvern.errors import ConfigError
from kvern.llm import LLM
from kvern.model import Transformer

PROMPTS = ["def add(a, b):\n    return a + b\ndef add(a, b):\n", "the cat sat on the mat, the cat sat"]


def with_mtp(tiny: Path, folder: Path, *, weights: bool = True) -> Path:
    """A checkpoint like `tiny` whose configuration announces an MTP layer, with or without its weights."""
    config = replace(ModelConfig.load(tiny), num_nextn_predict_layers=1)
    model = Transformer(config, device="cpu", mtp=weights)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    save_model(model, folder, config=config, files=text_files())
    return folder


def texts(folder: Path, settings: EngineSettings | None) -> tuple[list[str], LLM]:
    llm = LLM(folder, dtype="f32", threads=1, settings=settings)
    return [one.text for one in llm.generate(PROMPTS, max_tokens=40, temperature=0.0)], llm


def test_drafts_are_on_by_default_and_change_no_text(tiny_folder: Path) -> None:
    plain, _ = texts(tiny_folder, EngineSettings())
    drafted, llm = texts(tiny_folder, None)
    assert drafted == plain
    assert llm.engine.stats().accepted_draft_tokens > 0


def test_an_mtp_layer_is_loaded_where_it_drafts(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvern.engine.step_cost.PASS", 0.0)  # else it pays in no model so small
    folder = with_mtp(tiny_folder, tmp_path / "mtp")
    plain, llm = texts(folder, EngineSettings())
    assert not llm.engine.runner.mtp
    for drafts in ("auto", "mtp"):
        drafted, llm = texts(folder, EngineSettings(drafts=drafts))
        assert drafted == plain
        assert llm.engine.runner.mtp
        assert llm.engine.stats().draft_tokens > 0


def test_an_mtp_layer_that_is_only_announced_is_done_without(tiny_folder: Path, tmp_path: Path) -> None:
    folder = with_mtp(tiny_folder, tmp_path / "announced", weights=False)
    drafted, llm = texts(folder, None)
    assert drafted == texts(folder, EngineSettings())[0]
    assert not llm.engine.runner.mtp
    with pytest.raises(ConfigError, match="no MTP layer"):
        LLM(folder, settings=EngineSettings(drafts="mtp"))
