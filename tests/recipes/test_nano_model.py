"""kvern-nano's shape, its two mixtures, what is measured, and the way into the package."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from recipes.nano import tokenizer as nano_tokenizer
from recipes.nano.bundle import MOST_BYTES, bundle
from recipes.nano.corpus import Document
from recipes.nano.functions import functions
from recipes.nano.held_out import cost_of, windows
from recipes.nano.measure import as_markdown, samples
from recipes.nano.phases import Phases
from recipes.nano.shapes import dense, weigh
from recipes.nano.skills import World
from recipes.nano.tasks import scores
from tests.tiny import tiny_config, tiny_model

from kvern.checkpoint.convert import convert
from kvern.checkpoint.save import save_model
from kvern.config import ModelConfig
from kvern.data.row_stream import Row
from kvern.errors import CheckpointError
from kvern.llm import LLM

CONFIG = Path(__file__).parents[2] / "configs" / "nano.toml"
VOCABULARY = 700


def model_table() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads(CONFIG.read_text())["model"]
    return table


@pytest.fixture(scope="module")
def checkpoint(trained: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    config = replace(
        tiny_config(), vocab_size=VOCABULARY, max_position_embeddings=2048, bos_token_id=0, eos_token_id=(1,)
    )
    save_model(tiny_model(config), folder, config=config, files=nano_tokenizer.files(trained, 2048))
    return folder


def test_nano_is_a_v3_that_fits_into_the_package() -> None:
    config = ModelConfig.from_dict({"model_type": "deepseek_v3", **model_table()})
    assert config.vocab_size == nano_tokenizer.VOCABULARY
    assert config.q_lora_rank
    assert (config.first_k_dense_replace, config.n_shared_experts, config.num_nextn_predict_layers) == (1, 1, 1)
    assert (config.n_group, config.topk_group) == (8, 4)
    weight = weigh(model_table())
    assert 10_000_000 < weight.total < 25_000_000
    assert 4_000_000 < weight.active < 5_000_000
    assert weight.checkpoint_bytes < MOST_BYTES


def test_dense_models_have_what_nano_has_and_not_less() -> None:
    nano, active, total = weigh(model_table()), *(weigh(dense(model_table(), like)) for like in ("active", "total"))
    assert nano.active <= active.active < 1.01 * nano.active
    assert nano.total <= total.total < 1.01 * nano.total
    config = ModelConfig.from_dict({"model_type": "deepseek_v3", **dense(model_table(), "total")})
    assert not any(config.is_moe(layer) for layer in range(config.num_hidden_layers + 1))


@dataclass(frozen=True)
class Numbered:
    """Rows that say who made them."""

    name: int

    @property
    def fingerprint(self) -> str:
        return str(self.name)

    def row(self, index: int) -> Row:
        return Row(np.array([self.name, index]), (2,), None)


def test_the_second_mixture_begins_with_its_own_first_row() -> None:
    rows = Phases(Numbered(1), Numbered(2), 3)
    assert [rows.row(index).tokens.tolist() for index in range(5)] == [[1, 0], [1, 1], [1, 2], [2, 0], [2, 1]]
    assert rows.fingerprint != Phases(Numbered(1), Numbered(2), 4).fingerprint
    assert rows.fingerprint != Phases(Numbered(2), Numbered(1), 3).fingerprint


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 12, 13, 31, 32, 33])
def test_every_token_but_the_first_counts_once(count: int) -> None:
    counted = [first + at for first, begin in windows(count, 8) for at in range(begin, min(8, count - first))]
    assert counted == list(range(1, count))


def test_bits_per_byte_of_a_model_that_knows_nothing(trained: tokenizers.Tokenizer, tmp_path: Path) -> None:
    config = replace(tiny_config(), vocab_size=VOCABULARY)
    model = tiny_model(config)
    head = model.lm_head.weight
    assert head is not None
    torch.nn.init.zeros_(head)
    save_model(model, tmp_path / "zero", config=config, files=nano_tokenizer.files(trained, 256))
    text = "def add(a, b):\n    return a + b\n" * 40
    cost = cost_of(tmp_path / "zero", [Document("library", "a.py", text), Document("docs", "a.rst", "Hello.")], 64)
    assert [one.kind for one in cost] == ["library", "docs"]
    assert cost[0].tokens == len(trained.encode(text).ids)
    assert cost[0].bits_per_byte == pytest.approx(cost[0].tokens * math.log2(VOCABULARY) / len(text), rel=1e-4)


def test_a_checkpoint_is_asked_and_the_figures_become_a_page(checkpoint: Path) -> None:
    llm = LLM(checkpoint)
    source = "def find(name, paths):\n    # look\n    for path in paths:\n        return name in path\n"
    known = list(functions([Document("library", "m.py", source)]))
    found = scores(llm, known, World(known, []), 2)
    assert [one.task for one in found][-2:] == ["call the right tool", "tell its result"]
    written = samples(llm)
    figures = {
        "parameters": 1,
        "active": 1,
        "bytes": 1,
        "held_out": [],
        "tasks": [{"task": one.task, "asked": one.asked, "right": one.right} for one in found],
        "drafts": [],
        "samples": written,
    }
    assert "| call the right tool | 0 of" in as_markdown(figures)


def test_only_the_right_checkpoint_gets_into_the_package(checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "nano.toml"
    table = {**ModelConfig.load(checkpoint).to_dict(), "torch_dtype": "float32"}
    lines = [f"{key} = {str(value).lower()}" for key, value in table.items() if isinstance(value, int)]
    config.write_text("[model]\n" + "\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match="is not in FP8"):
        bundle(checkpoint, config, tmp_path / "package")
    convert(checkpoint, tmp_path / "fp8", dtype="fp8")
    with pytest.raises(CheckpointError, match="not of the shape"):
        bundle(tmp_path / "fp8", CONFIG, tmp_path / "package")
    (tmp_path / "fp8" / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"lacks chat_template\.jinja"):
        bundle(tmp_path / "fp8", config, tmp_path / "package")
    (tmp_path / "fp8" / "chat_template.jinja").write_text(nano_tokenizer.chat_template())
    placed = bundle(tmp_path / "fp8", config, tmp_path / "package")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (placed / "LICENSE-PSF.txt").read_text()
    assert LLM(placed).generate("def", max_tokens=1).completion_tokens == 1
