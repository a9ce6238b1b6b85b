"""Fine-tuning on chats: only answers are learned, and a small model learns one; the schedule is the report's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.tiny import tiny_config, tiny_model
from tests.train.small import train

from kvern.checkpoint.save import save_model
from kvern.data.build import TextSide, build
from kvern.data.options import DataOptions
from kvern.data.row_stream import RowStream
from kvern.model import ForwardBatch
from kvern.text.conversation import Conversation
from kvern.text.messages import Message
from kvern.text.template import ChatTemplate
from kvern.text.tokenizer import Tokenizer
from kvern.train import config as train_config
from kvern.train.checkpoint import Checkpoints
from kvern.train.loss import training_loss
from kvern.train.mesh import Ranks
from kvern.train.model import make_trainable
from kvern.train.step import pack
from kvern.train.trainer import Trainer

QUESTION, ANSWER = "the cat sat", "on the mat"
SFT = Path(__file__).parents[2] / "configs/sft.toml"


@pytest.fixture(scope="module")
def text(tiny_folder: Path) -> TextSide:
    tokenizer = Tokenizer.load(tiny_folder)
    return TextSide(tokenizer, ChatTemplate.load(tiny_folder, tokenizer))


@pytest.fixture
def rows(text: TextSide, tmp_path: Path) -> RowStream:
    """Packed rows of one conversation."""
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    options = DataOptions.model_validate({"sources": [{"path": str(tmp_path / "chats.jsonl")}], "fim_rate": 0.0})
    return build(options, text, tmp_path / "tokens").train(64)


def test_questions_have_no_loss(rows: RowStream, text: TextSide) -> None:
    """Another question changes the answer's loss; the loss is that of the answer's tokens and its end alone."""
    row = rows.row(0)
    assert row.learned is not None
    learned = row.tokens[row.learned]
    assert text.tokenizer.decode(learned.tolist()).startswith(ANSWER)
    model = tiny_model(tiny_config())
    packed = pack([row], torch.device("cpu"))
    with torch.no_grad():
        logits = model(packed.batch)
    wanted = [place for place in range(1, len(row.tokens)) if row.learned[place]]
    by_hand = -sum(float(logits[place - 1].log_softmax(-1)[row.tokens[place]]) for place in wanted) / len(wanted)
    make_trainable(model)
    assert float(training_loss(model, packed).main.detach()) == pytest.approx(by_hand, rel=1e-5)


def test_a_tiny_model_learns_an_answer(rows: RowStream, text: TextSide, tiny_folder: Path, tmp_path: Path) -> None:
    settings = train_config.parse(
        {
            "steps": 60,
            "model": {"folder": str(tiny_folder)},
            "data": {"sources": [{"path": "chats.jsonl"}]},
            "batch": {"rows": 2, "length": 64},
            "precision": {"dtype": "f32"},
            "learning_rate": {"peak": 5e-3, "low": 1e-3, "last": 1e-3, "warmup_steps": 5, "constant_tokens": 0},
        }
    )
    run = Trainer(settings, rows, Ranks(0, 1, torch.device("cpu")), Checkpoints(tmp_path / "checkpoints", 1))
    train(run, tmp_path)
    assert text.template is not None
    asked = Conversation((Message("user", QUESTION),))
    ids, _ = text.template.prompt(asked)
    given = len(ids)
    for _ in range(20):
        with torch.no_grad():
            ids.append(int(run.model.eval()(ForwardBatch.of(ids))[-1].argmax()))
    assert text.tokenizer.decode(ids[given:]).startswith(ANSWER)


def test_the_example_is_the_report_s_schedule(tmp_path: Path) -> None:
    config = replace(tiny_config(), max_position_embeddings=4096)
    save_model(tiny_model(config), tmp_path / "base", config=config)
    settings = train_config.load(SFT, [f"model.folder={tmp_path / 'base'}"])
    rate, all_tokens = settings.learning_rate.schedule(), settings.tokens or 0
    assert rate.at(100, 0) == 5e-6
    assert rate.at(100, all_tokens // 2) == pytest.approx(3e-6)
    assert rate.at(100, all_tokens) == 1e-6
