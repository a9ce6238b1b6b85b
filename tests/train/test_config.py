"""The configuration of a run: every key is checked, every error names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.train.small import MODEL, config, raw

from kvern.errors import ConfigError
from kvern.train.config import load, parse


def test_what_is_written_out_reads_back(tmp_path: Path) -> None:
    windows = [{"rows": 8, "length": 4}, {"rows": 80, "length": 16}]
    before = config(batch={"rows": 8, "length": 32, "ramp": {"first": 2, "tokens": 1000}, "windows": windows})
    path = tmp_path / "config.toml"
    path.write_text(before.toml())
    assert load(path) == before
    assert load(path).fingerprint() == before.fingerprint()


def test_defaults_are_the_report_s() -> None:
    settings = config(learning_rate={})
    rate, loss = settings.learning_rate.schedule(), settings.loss.options()
    assert (rate.peak, rate.warmup_steps, settings.optimizer.betas) == (2.2e-4, 2000, (0.9, 0.95))
    assert (loss.mtp.first, loss.mtp.later, loss.balance, settings.loss.bias_step) == (0.3, 0.1, 1e-4, 1e-3)
    assert parse(raw(model={k: v for k, v in MODEL.items() if k != "initializer_range"})).initial_std == 0.006
    model = settings.architecture()
    assert (model.hidden_size, model.torch_dtype, model.quantization_config) == (32, "float32", None)


def test_values_are_set_from_outside(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(config().toml())
    overrides = ["batch.rows=16", "learning_rate.peak = 3e-3", "precision.dtype=bf16", "loss.norm_first=false"]
    changed = load(path, overrides)
    assert (changed.batch.rows, changed.learning_rate.peak, changed.precision.dtype) == (16, 3e-3, "bf16")
    assert not changed.loss.norm_first
    with pytest.raises(ConfigError, match="is not key=value"):
        load(path, ["batch.rows"])
    with pytest.raises(ConfigError, match="steps is no table"):
        load(path, ["steps.more=1"])


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"batch": {"rows": 4, "lenght": 32}}, "unknown key batch.lenght", "did you mean batch.length?"),
    ({"optimiser": {}}, "unknown key optimiser", "did you mean optimizer?"),
    ({"batch": {"rows": 4, "length": 32, "ramp": {"frist": 1, "tokens": 9}}}, "unknown key batch.ramp.frist", "first"),
    ({"model": {**MODEL, "hiden_size": 4}}, "unknown key model.hiden_size", "did you mean model.hidden_size?"),
    ({"batch": {"rows": 0, "length": 32}}, "batch.rows: ", ""),
    ({"batch": {"rows": 4}}, "batch.length is missing", ""),
    ({"batch": {"rows": "four", "length": 32}}, "batch.rows: .*, not 'four'", ""),
    ({"batch": {"rows": 4, "length": 65}}, "batch.length is 65, and the model's window 64 tokens", "shorter rows"),
    ({"batch": {"rows": 4, "length": 32, "ramp": {"first": 8, "tokens": 9}}}, "over batch.rows, which is 4", ""),
    ({"batch": {"rows": 6, "length": 32, "ramp": {"first": 4, "tokens": 9}}}, "batch.rows is 6, no multiple", ""),
    ({"batch": {"rows": 4, "length": 32, "windows": [{"rows": 9, "length": 32}]}}, "a window of 32 cuts nothing", ""),
    ({"batch": {"rows": 4, "length": 32, "windows": [{"rows": 9, "length": 8}] * 2}}, "windows must grow", ""),
    ({"optimizer": {"name": "muno"}}, "optimizer.name: .*'adamw' or 'muon', not 'muno'", ""),
    ({"precision": {"dtype": "f16"}}, "precision.dtype: .*'bf16' or 'f32', not 'f16'", ""),
    ({"learning_rate": {"peak": 1e-6}}, "learning_rate: rates must fall", ""),
    ({"learning_rate": {"peak": float("nan")}}, "learning_rate.peak: .*finite", ""),
    ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer: betas must be from 0 to under 1", ""),
    ({"optimizer": {"momentum": 0.9}}, "optimizer: momentum is Muon's; betas are AdamW's", ""),
    ({"model": {**MODEL, "hidden_size": 0}}, "model.hidden_size must be positive, not 0", ""),
    ({"model": {**MODEL, "initializer_range": "big"}}, "model.initializer_range must be a positive number", ""),
    ({"model": {k: v for k, v in MODEL.items() if k != "v_head_dim"}}, "model.* lacks v_head_dim", ""),
    ({"model": {**MODEL, "folder": "x"}}, "model.vocab_size beside model.folder", ""),
    ({"mesh": {"expert": 3}}, "mesh.expert is 3, which does not divide the model's 4 experts", ""),
    ({"tokens": 5}, "give steps or tokens, and not both", ""),
    ({"steps": None}, "give steps or tokens", ""),
    ({"seed": -1}, "seed: ", ""),
    ({"data": {"sources": []}}, "data.sources: ", ""),
    ({"data": {"sources": [{"path": "x", "wieght": 1}]}}, "unknown key data.sources.0.wieght", "sources.0.weight"),
    ({"data": {"source": [{"path": "x"}]}}, "unknown key data.source", "did you mean data.sources?"),
    ({"recompute": {"activations": "all"}}, "recompute.activations", ""),
]


@pytest.mark.parametrize(("changes", "message", "hint"), WRONG, ids=[one[1][:40] for one in WRONG])
def test_a_wrong_key_is_named(changes: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(raw(**changes))
    assert hint in (caught.value.hint or "")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("steps = ")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.toml"):
        load(tmp_path / "binary.toml")


def test_a_batch_that_ranks_cannot_share() -> None:
    batch = config(batch={"rows": 12, "length": 32, "ramp": {"first": 4, "tokens": 9}}).batch
    assert batch.schedule(4).at(0) == 4
    with pytest.raises(ConfigError, match=r"batch\.ramp\.first is 4, which 3 ranks"):
        batch.schedule(3)


def test_only_what_decides_the_numbers_counts_as_change() -> None:
    before = config()
    same = config(steps=9, checkpoint={"every": 1}, recompute={"activations": "block"}, mesh={"expert": 2})
    assert before.changed(same) == []
    assert before.fingerprint() == same.fingerprint()
    other = config(seed=1, learning_rate={"peak": 1e-3})
    assert before.changed(other) == ["learning_rate.peak", "learning_rate.warmup_steps", "seed"]
    assert before.fingerprint() != other.fingerprint()
