"""config.json of the V3 family: read, written, and refused by name where the maths could differ."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.oracle import random_config

from kvern.config import ModelConfig, known_configurations
from kvern.errors import CheckpointError, ConfigError, NotFoundError, UnsupportedModelError

V3 = ModelConfig.named("deepseek-v3").to_dict()


@pytest.mark.parametrize("name", known_configurations())
def test_known_configurations_survive_a_round_trip(name: str) -> None:
    config = ModelConfig.named(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("seed", range(20))
def test_random_configurations_survive_a_round_trip_through_transformers(seed: int) -> None:
    from transformers import DeepseekV3Config

    config = random_config(seed)
    values = {k: v for k, v in config.to_dict().items() if k not in ("architectures", "torch_dtype", "model_type")}
    rewritten = DeepseekV3Config(**values, dtype="float32").to_dict()
    assert "rope_parameters" in rewritten
    again = ModelConfig.from_dict(rewritten)
    assert {**again.to_dict(), "rope_scaling": None} == {**config.to_dict(), "rope_scaling": None}
    assert again.softmax_scale == config.softmax_scale
    if config.rope_scaling:
        assert again.rope_scaling
        assert again.rope_scaling.rotation_factor == config.rope_scaling.rotation_factor


def test_v3_scale_is_the_published_one() -> None:
    assert ModelConfig.named("deepseek-v3").softmax_scale == pytest.approx(0.135234, abs=1e-6)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen3"}, "model_type"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"scoring_func": "softmax"}, "scoring_func"),
    ({"topk_method": "group_limited_greedy"}, "topk_method"),
    ({"moe_layer_freq": 2}, "moe_layer_freq"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"rope_interleave": False}, "rope_interleave"),
    ({"num_key_value_heads": 8}, "num_key_value_heads"),
    ({"sliding_window": 4096}, "sliding_window"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": {**V3["rope_scaling"], "low_freq_factor": 1.0}}, "low_freq_factor"),
    ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ({"quantization_config": {**V3["quantization_config"], "weight_block_size": [64, 64]}}, "weight_block_size"),
    ({"torch_dtype": "float16"}, "float16"),
]


@pytest.mark.parametrize(("change", "named"), REFUSED)
def test_other_maths_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        ModelConfig.from_dict({**V3, **change})


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "7168"}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"vocab_size": None}, "vocab_size"),
    ({"qk_rope_head_dim": 63, "head_dim": None}, "qk_rope_head_dim"),
    ({"n_group": 7}, "n_group"),
    ({"topk_group": 9}, "topk_group"),
    ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rope_theta": -1}, "rope_theta"),
    ({"eos_token_id": "1"}, "eos_token_id"),
    ({"rope_scaling": {"type": "yarn", "factor": 0, "original_max_position_embeddings": 4096}}, "factor"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
]


@pytest.mark.parametrize(("change", "named"), MALFORMED)
def test_malformed_values_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict({**V3, **change})


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ROPE_KEYS = ["type", "rope_type", "rope_theta", *V3["rope_scaling"], "attention_factor", "short_factor", "truncate"]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from([*V3, "rope_parameters", "dtype"]), ANY_JSON)
def test_any_value_of_any_key_is_read_or_refused(key: str, value: Any) -> None:
    with contextlib.suppress(ConfigError):
        ModelConfig.from_dict({**V3, key: value})


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(ROPE_KEYS), ANY_JSON)
def test_any_value_of_any_rope_key_is_read_or_refused(key: str, value: Any) -> None:
    with contextlib.suppress(ConfigError):
        ModelConfig.from_dict({**V3, "rope_scaling": {**V3["rope_scaling"], key: value}})


@given(st.sampled_from(sorted(V3["quantization_config"])), ANY_JSON)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_quantisation_value_is_read_or_refused(key: str, value: Any) -> None:
    with contextlib.suppress(ConfigError):
        ModelConfig.from_dict({**V3, "quantization_config": {**V3["quantization_config"], key: value}})


def test_inert_fields_are_ignored() -> None:
    inert = {"initializer_range": 0.006, "aux_loss_alpha": 0.001, "auto_map": {}, "transformers_version": "4.33"}
    assert ModelConfig.from_dict({**V3, **inert}) == ModelConfig.named("deepseek-v3")


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(NotFoundError) as caught:
        ModelConfig.named("deepseek-v9")
    assert "deepseek-v3" in (caught.value.hint or "")


@pytest.mark.parametrize("content", [None, "{", "[]", "\udcff"])
def test_a_missing_or_broken_file_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        ModelConfig.load(tmp_path)
