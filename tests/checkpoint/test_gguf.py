"""GGUF files: the model that they hold, damage, what is refused, and the tokenizer against transformers' reading."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from tests.checkpoint.gguf_files import SPECIAL, TOKENS, add_tokenizer, write_gguf
from tests.checkpoint.gqa_models import logits, random_model, relative_error
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvern.checkpoint.convert import convert
from kvern.checkpoint.gguf import GGUFSource
from kvern.checkpoint.gguf_tokenizer import PRE_TOKENIZERS
from kvern.checkpoint.gqa import plan_import
from kvern.checkpoint.load import load
from kvern.errors import CheckpointError, KvernError, UnsupportedModelError
from kvern.model.batch import ForwardBatch

IDS = torch.randint(0, 200, (1, 40), generator=torch.Generator().manual_seed(2))
TEXTS = [
    "def the_thing(in12345):\n\treturn   'the'  \r\n",
    "<|start|>the <tool>in<|im_end|>",
    "Grüße, naïve café — 日本語 🎉 e\u0301",
    "I'LL don't  \n\n  x [PAD0]",
    "",
]


def imported_logits(file: Path, folder: Path) -> torch.Tensor:
    convert(file, folder, dtype="f32")
    with torch.no_grad():
        found: torch.Tensor = load(folder)(ForwardBatch.of(IDS[0].tolist()))
    return found[None]


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("qwen2", "qwen2"),
        ("qwen2 tied, R=128", "qwen2"),
        ("llama untied", "llama"),
        ("llama wide heads, ragged", "llama"),
        ("llama all biases", "llama"),
    ],
)
def test_imported_file_computes_the_model(name: str, architecture: str, tmp_path: Path) -> None:
    model = random_model(name)
    file = write_gguf(tmp_path / "model.gguf", model, architecture)
    assert relative_error(imported_logits(file, tmp_path / "v3"), logits(model, IDS)) < 1e-5


def test_llama3_frequency_factors_are_folded(tmp_path: Path) -> None:
    model = random_model("llama tied, llama3 rope")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config)
    plain = 1.0 / model.config.rope_parameters["rope_theta"] ** (torch.arange(0, 16, 2) / 16)
    file = write_gguf(tmp_path / "model.gguf", model, "llama", rope_factors=plain / scaled)
    assert relative_error(imported_logits(file, tmp_path / "v3"), logits(model, IDS)) < 1e-5


@pytest.mark.parametrize(("name", "kind"), [("llama linear", "linear"), ("llama yarn", "yarn")])
def test_rope_scaling_metadata(name: str, kind: str, tmp_path: Path) -> None:
    model = random_model(name)
    rope = model.config.rope_parameters
    keys = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        keys["llama.rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    file = write_gguf(tmp_path / "model.gguf", model, "llama", metadata=keys)
    assert relative_error(imported_logits(file, tmp_path / "v3"), logits(model, IDS)) < 1e-5


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
def test_types_are_dequantized(kind: str, tmp_path: Path) -> None:
    model = random_model("llama untied")
    file = write_gguf(tmp_path / "model.gguf", model, "llama", type=GGMLQuantizationType[kind])
    source = GGUFSource(file)
    for name in ("model.layers.1.self_attn.k_proj.weight", "lm_head.weight"):
        expected = model.state_dict()[name]
        found = source.tensor(name)
        assert found.dtype is torch.float32
        bits = {"F16": 11, "BF16": 8, "Q8_0": 7, "Q5_0": 4, "Q5_1": 4, "Q4_0": 3, "Q4_1": 3}[kind]
        assert relative_error(found, expected) < 2.0 ** (-bits + 0.5), name
        assert relative_error(found, expected) > 0


def test_config_and_names(tmp_path: Path) -> None:
    source = GGUFSource(write_gguf(tmp_path / "model.gguf", random_model("llama wide heads, ragged"), "llama"))
    assert source.config["head_dim"] == 36
    assert source.config["rms_norm_eps"] == 1e-6
    assert source.config["eos_token_id"] == [TOKENS.index("<|im_end|>")]
    assert "model.layers.2.mlp.down_proj.weight" in source.names()
    assert json.loads(source.files["generation_config.json"]) == {
        "bos_token_id": TOKENS.index("<|start|>"),
        "eos_token_id": [TOKENS.index("<|im_end|>")],
    }


def test_head_is_output_weight_where_present(tmp_path: Path) -> None:
    untied = GGUFSource(write_gguf(tmp_path / "untied.gguf", random_model("llama untied"), "llama"))
    tied = GGUFSource(write_gguf(tmp_path / "tied.gguf", random_model("qwen2 tied, R=128"), "qwen2"))
    assert not untied.config["tie_word_embeddings"]
    assert tied.config["tie_word_embeddings"]


def test_truncation_anywhere_is_noticed(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "model.gguf", random_model("qwen2"), "qwen2").read_bytes()
    cut = tmp_path / "cut.gguf"
    for kept in [0, 3, 10, 30, 200, 3000, 9000, len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GGUFSource(cut)


@pytest.mark.parametrize("offset", range(0, 256, 7))
def test_damage_in_the_header_is_an_error_of_ours(offset: int, tmp_path: Path) -> None:
    damaged = bytearray(write_gguf(tmp_path / "model.gguf", random_model("qwen2"), "qwen2").read_bytes())
    damaged[offset] ^= 0xFF
    (tmp_path / "damaged.gguf").write_bytes(damaged)
    with suppress(KvernError):  # a flipped byte of a name that nobody reads is no damage
        plan_import(GGUFSource(tmp_path / "damaged.gguf"), "f32")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.gguf: No such file"):
        GGUFSource(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"llama.expert_count": 8}, "num_local_experts"),
        ({"llama.rope.dimension_count": 8}, "partial_rotary_factor"),
        ({"llama.attention.sliding_window": 64}, "sliding_window"),
        ({"llama.attention.clamp_kqv": 8.0}, "clip_qkv"),
        ({"llama.rope.scaling.type": "longrope"}, r"rope\.scaling\.type"),
        ({"llama.logit_scale": 2.0}, "logits_scaling"),
    ],
)
def test_other_maths_is_refused(keys: dict[str, Any], match: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", random_model("llama untied"), "llama", metadata=keys)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=match):
        plan_import(GGUFSource(file), "f32")


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", random_model("llama untied"), "qwen3")
    with pytest.raises(UnsupportedModelError, match=r"general\.architecture 'qwen3'"):
        GGUFSource(file)


def tokenizer_file(folder: Path, **options: Any) -> Path:
    writer = GGUFWriter(folder / "tokenizer.gguf", "llama")
    writer.add_context_length(512)
    add_tokenizer(writer, **options)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tokenizer.gguf"


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-2"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_ids_equal_transformers(pre: str, add_bos: bool, tmp_path: Path) -> None:
    file = tokenizer_file(tmp_path, pre=pre, add_bos=add_bos)
    written = GGUFSource(file).tokenizer_files(512)
    ours = Tokenizer.from_str(written["tokenizer.json"].decode())
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text).input_ids, text
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) in (text, f"<|start|>{text}")


def test_the_folder_reads_in_transformers(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", random_model("qwen2"), "qwen2")
    convert(file, tmp_path / "v3", dtype="bf16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "v3")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert tokenizer("<|start|>").input_ids == [TOKENS.index("<|start|>")]
    assert SPECIAL["<tool>"] == 4
    assert "<tool>" not in tokenizer.all_special_tokens


def test_smollm_splits_digits(tmp_path: Path) -> None:
    written = GGUFSource(tokenizer_file(tmp_path, pre="smollm")).tokenizer_files(512)
    assert len(Tokenizer.from_str(written["tokenizer.json"].decode()).encode("12").ids) == 2


@pytest.mark.parametrize(
    ("options", "match"), [({"pre": "odd"}, r"ggml\.pre 'odd'"), ({"model": "llama"}, "ggml.model")]
)
def test_unknown_vocabularies_are_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        GGUFSource(tokenizer_file(tmp_path, **options)).tokenizer_files(512)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_loses_nothing(pre: str) -> None:
    for text in TEXTS:
        pieces = PRE_TOKENIZERS[pre]().pre_tokenize_str(text)
        assert sum(end - start for _, (start, end) in pieces) == len(text)
