"""The run with two mixtures, on a small scale: it learns from one, then from the other, and goes on after a stop."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from recipes.nano import rows
from recipes.nano.train import train

from kvern.errors import ConfigError

MODEL = """
steps = {steps}
[model]
vocab_size = 704
hidden_size = 32
intermediate_size = 48
moe_intermediate_size = 16
num_hidden_layers = 2
first_k_dense_replace = 1
num_attention_heads = 2
n_routed_experts = 4
n_shared_experts = 1
num_experts_per_tok = 2
n_group = 2
topk_group = 1
norm_topk_prob = true
routed_scaling_factor = 2.5
kv_lora_rank = 16
q_lora_rank = 16
qk_rope_head_dim = 8
qk_nope_head_dim = 8
v_head_dim = 16
num_nextn_predict_layers = 1
max_position_embeddings = 128
initializer_range = 0.02
[batch]
rows = 2
length = 128
[learning_rate]
peak = 1e-3
warmup_steps = 1
[checkpoint]
every = 2
"""
DATA = """
[data]
tokenizer = "{tokenizer}"
fim_rate = 0.0
[[data.sources]]
path = "{source}"
"""


@pytest.fixture
def files(tmp_path: Path, tokenizer_folder: Path) -> tuple[Path, Path]:
    """The two configurations; the second mixture holds chats."""
    text = tmp_path / "m.py"
    text.write_text("".join(f"def number_{one}():\n    return {one}\n" for one in range(200)))
    rows.write((rows.chat(f"What is {one}?", f"It is {one}.") for one in range(100)), tmp_path / "chats.jsonl")
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text(MODEL.format(steps=4) + DATA.format(tokenizer=tokenizer_folder, source=text))
    second.write_text("from_row = 4\n" + DATA.format(tokenizer=tokenizer_folder, source=tmp_path / "chats.jsonl"))
    return first, second


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_two_mixtures_in_one_run_which_goes_on(tmp_path: Path, files: tuple[Path, Path]) -> None:
    first, anneal = files
    outcome = train(tmp_path / "whole", first=first, anneal=anneal)
    assert (outcome.progress.step, outcome.progress.consumed) == (4, 8)
    train(tmp_path / "parts", first=first, anneal=anneal, overrides=["steps=3"])
    with pytest.raises(ConfigError, match="holds a run already"):
        train(tmp_path / "parts", first=first, anneal=anneal)
    train(tmp_path / "parts", first=first, anneal=anneal, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    other = tmp_path / "other.toml"
    other.write_text(anneal.read_text().replace("from_row = 4", "from_row = 6"))
    train(tmp_path / "later", first=first, anneal=other)
    assert losses(tmp_path / "later")[:2] == losses(tmp_path / "whole")[:2]
    assert losses(tmp_path / "later")[2] != losses(tmp_path / "whole")[2]


def test_a_signal_ends_it_with_a_word_of_how_to_go_on(
    tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"

    def stop() -> None:
        while not metrics.exists() or not metrics.stat().st_size:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    outcome = train(tmp_path / "run", first=files[0], anneal=files[1], overrides=["steps=1000"])
    assert outcome.exit_code == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert "m.py: 1 documents, " in said
    assert "chats.jsonl: 100 documents, " in said
    assert said.endswith(f"stopped by SIGTERM after step {outcome.progress.step}; --resume auto goes on\n")
    assert (tmp_path / f"run/checkpoints/step-{outcome.progress.step:08}").exists()
    train(
        tmp_path / "run", first=files[0], anneal=files[1], overrides=[f"steps={outcome.progress.step + 1}"], resume=True
    )
    assert f"going on after step {outcome.progress.step}, " in capsys.readouterr().err


def test_a_dense_model_runs_on_the_same_rows(tmp_path: Path, files: tuple[Path, Path]) -> None:
    outcome = train(tmp_path / "dense", like="active", first=files[0], anneal=files[1])
    assert outcome.progress.step == 4
    assert "n_routed_experts" not in (tmp_path / "dense" / "config.toml").read_text()
