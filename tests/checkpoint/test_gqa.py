"""Imports of random Llama and Qwen2 models against the source, in transformers' DeepseekV3 and in Kvern's model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.gqa_models import MODELS, ModelSource, logits, random_model, relative_error
from transformers import DeepseekV3ForCausalLM, PreTrainedModel

from kvern.checkpoint import gqa
from kvern.checkpoint.gqa import import_cost, plan_import
from kvern.checkpoint.gqa_source import inverse_frequencies, read_shape
from kvern.checkpoint.load import load
from kvern.checkpoint.quantize import dequantize, quantize
from kvern.checkpoint.reader import CheckpointReader
from kvern.checkpoint.save import plan_shards, write_checkpoint
from kvern.config import QuantizationConfig
from kvern.errors import CheckpointError, ConfigError, UnsupportedModelError
from kvern.model.batch import ForwardBatch, MLAForm

FP32_TOLERANCE = 1e-5
IDS = torch.randint(0, 320, (1, 150), generator=torch.Generator().manual_seed(1))


def written(folder: Path, model: PreTrainedModel, dtype: gqa.DType) -> Path:
    config, tensors = plan_import(ModelSource.of(model), dtype)
    write_checkpoint(folder, config, plan_shards(tensors), files={}, source="test")
    return folder


def kvern_logits(folder: Path, form: MLAForm | None = None) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load(folder)(ForwardBatch.of(IDS[0].tolist(), form=form))
    return found[None].float()


@pytest.mark.parametrize("name", MODELS)
def test_fp32_logits_equal_the_source(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    expected = logits(model, IDS)
    folder = written(tmp_path / "v3", model, "f32")
    in_transformers = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert relative_error(logits(in_transformers, IDS), expected) < FP32_TOLERANCE
    for form in MLAForm:
        assert relative_error(kvern_logits(folder, form), expected) < FP32_TOLERANCE, form


def quantized_like_fp8(model: PreTrainedModel) -> PreTrainedModel:
    """The source with its own Linear weights through FP8 blocks, the rest BF16, as an FP8 checkpoint of it would be."""
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        for (name, parameter), original in zip(rounded.named_parameters(), model.parameters(), strict=True):
            if "_proj.weight" in name:
                parameter.copy_(dequantize(*quantize(original), torch.bfloat16))
    return rounded


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_low_precision_is_no_worse_than_the_source_in_it(name: str, dtype: gqa.DType, tmp_path: Path) -> None:
    model = random_model(name)
    exact = logits(model, IDS)
    same = copy.deepcopy(model).to(torch.bfloat16) if dtype == "bf16" else quantized_like_fp8(model)
    source_error = (logits(same, IDS) - exact).square().mean().sqrt()
    import_error = (kvern_logits(written(tmp_path / "v3", model, dtype)) - exact).square().mean().sqrt()
    assert import_error < 1.2 * source_error


def test_bf16_folder_loads_in_transformers(tmp_path: Path) -> None:
    model = random_model("qwen2")
    folder = written(tmp_path / "v3", model, "bf16")
    loaded = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert relative_error(logits(loaded, IDS), logits(model, IDS)) < 0.05


def test_latent_norms_are_f32_in_every_dtype(tmp_path: Path) -> None:
    reader = CheckpointReader(written(tmp_path / "v3", random_model("qwen2"), "fp8"))
    norm = reader.tensor("model.layers.0.self_attn.kv_a_layernorm.weight")
    assert norm.dtype is torch.float32
    assert norm[0] == pytest.approx(1e-3 * 2**24, rel=1e-7)


def test_scaled_rows_never_share_a_block(tmp_path: Path) -> None:
    ragged = CheckpointReader(written(tmp_path / "ragged", random_model("qwen2"), "fp8"))
    whole = CheckpointReader(written(tmp_path / "whole", random_model("qwen2 tied, R=128"), "fp8"))
    mixed = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert ragged.spec(mixed).dtype is torch.bfloat16
    assert isinstance(ragged.config.quantization_config, QuantizationConfig)
    assert ragged.config.quantization_config.modules_to_not_convert == ("kv_a_proj_with_mqa",)
    assert whole.spec(mixed).dtype is torch.float8_e4m3fn
    scales = whole.tensor(f"{mixed}_scale_inv")
    assert scales[0].max() < 1e-8 < 1e-5 < scales[1].min()


def test_fp8_of_scaled_rows_keeps_their_precision(tmp_path: Path) -> None:
    model = random_model("qwen2 tied, R=128")
    reader = CheckpointReader(written(tmp_path / "v3", model, "fp8"))
    name = "model.layers.0.self_attn.q_a_proj.weight"
    found = dequantize(reader.tensor(name), reader.tensor(f"{name}_scale_inv")) / gqa.DELTA
    expected = dequantize(*quantize(model.state_dict()["model.layers.0.self_attn.q_proj.weight"]))
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)


def test_selections_are_exact_in_fp8(tmp_path: Path) -> None:
    reader = CheckpointReader(written(tmp_path / "v3", random_model("llama untied"), "fp8"))
    name = "model.layers.0.self_attn.q_b_proj.weight"
    found = dequantize(reader.tensor(name), reader.tensor(f"{name}_scale_inv"))
    assert torch.equal(found, gqa.query_scatter(8, 4, 16))
    assert found.sum(1).max() == 1
    assert torch.equal(found.sum(0), torch.ones(found.shape[1]))


@pytest.mark.parametrize("mutation", ["permutation", "delta", "softmax"])
def test_parity_notices_a_wrong_import(mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("qwen2")
    if mutation == "permutation":
        monkeypatch.setattr(gqa, "interleaved_rows", lambda heads, size: torch.arange(heads * size))
    elif mutation == "delta":
        monkeypatch.setattr(gqa, "DELTA", 2.0**-8)
    else:
        monkeypatch.setattr("kvern.checkpoint.gqa.math.sqrt", lambda value: 1.0 if value > 1 else value**0.5)
    error = relative_error(kvern_logits(written(tmp_path / "v3", model, "f32")), logits(model, IDS))
    assert error > 100 * FP32_TOLERANCE


LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
}
QWEN2_05B = {
    **LLAMA,
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
QWEN2_7B = {
    **LLAMA,
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize(("config", "ratio"), [(QWEN2_05B, 1.08), (QWEN2_7B, 1.21), (LLAMA, 1.59)])
def test_import_cost(config: dict[str, Any], ratio: float) -> None:
    assert import_cost(config).ratio == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "qwen3"}, "model_type"),
        ({"model_type": "gemma3_text"}, "model_type"),
        ({"model_type": "mixtral"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"alibi": True}, "alibi"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window"),
        (
            {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 16},
            "sliding_window",
        ),
        ({"sliding_window": 4096, "layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "long_factor"),
        ({"head_dim": 33}, "head_dim"),
    ],
)
def test_other_maths_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedModelError, match=field):
        read_shape({**LLAMA, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen2", "sliding_window": 32768, "use_sliding_window": False},
        {"model_type": "mistral", "sliding_window": None},
        {"sliding_window": 131072, "layer_types": ["full_attention"] * 32},
        {"hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1.0},
    ],
)
def test_harmless_values_are_accepted(change: dict[str, Any]) -> None:
    assert read_shape({**LLAMA, **change}).latent_rank == 1024


def test_configuration_errors_name_the_field() -> None:
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        read_shape({**LLAMA, "num_key_value_heads": 5})
    with pytest.raises(ConfigError, match="intermediate_size"):
        read_shape({**LLAMA, "intermediate_size": None})
    with pytest.raises(ConfigError, match="low_freq_factor"):
        read_shape({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}})


def test_tensors_are_accounted_for() -> None:
    source = ModelSource.of(random_model("llama untied"))
    extra = {**source.tensors, "model.layers.0.self_attn.q_norm.weight": torch.ones(16)}
    with pytest.raises(UnsupportedModelError, match="q_norm"):
        plan_import(ModelSource(source.config, extra), "f32")
    missing = {name: tensor for name, tensor in source.tensors.items() if "layers.1.mlp.up" not in name}
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight: tensor is missing"):
        plan_import(ModelSource(source.config, missing), "f32")
    wrong = {**source.tensors, "model.norm.weight": torch.ones(3)}
    _, planned = plan_import(ModelSource(source.config, wrong), "f32")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: shape \[3\]"):
        next(tensor for tensor in planned if tensor.name == "model.norm.weight").make()


def test_nothing_is_read_while_planning() -> None:
    source = ModelSource.of(random_model("qwen2"))

    class Untouchable(ModelSource):
        def tensor(self, name: str) -> torch.Tensor:
            raise AssertionError(name)

    _, planned = plan_import(Untouchable(source.config, source.tensors), "fp8")
    assert len({tensor.name for tensor in planned}) == len(planned)


def test_yarn_of_qwen2_is_folded_into_the_queries() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    _, attention_factor = inverse_frequencies(yarn, 128, 131072)
    assert attention_factor == pytest.approx(1.138629, abs=1e-6)
    assert read_shape({**LLAMA, "rope_scaling": yarn}).score_factor == pytest.approx(1.138629**2, abs=1e-5)
