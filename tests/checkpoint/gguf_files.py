"""Writes small GGUF files as llama.cpp's converter does: its names, its row order, a byte-level vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import PreTrainedModel

from kvern.checkpoint.gguf_tokenizer import BYTE_SPELLING

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

MERGES = ["t h", "th e", "Ġ the", "i n", "1 2", "Ġ Ġ", "d e", "de f"]
SPECIAL = {"<|start|>": 3, "<|im_end|>": 3, "<tool>": 4, "[PAD0]": 5}
TOKENS = [*BYTE_SPELLING.values(), *(merge.replace(" ", "") for merge in MERGES), *SPECIAL]


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def interleaved(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's `permute`: half-split rows of each head into interleaved pairs."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    *,
    type: GGMLQuantizationType = GGMLQuantizationType.F32,
    rope_factors: torch.Tensor | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """The model as a GGUF file; `metadata` adds or replaces keys (architecture prefix given by the caller)."""
    writer = GGUFWriter(path, architecture)
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(model))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    add_tokenizer(writer)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, _value_type(value))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = tensor.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if architecture == "llama" and part in name:
                rows = interleaved(rows, heads)
        kind = type if rows.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), quantize(np.ascontiguousarray(rows), kind), raw_dtype=kind)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: GGUFWriter, pre: str = "qwen2", model: str = "gpt2", add_bos: bool = False) -> None:
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([SPECIAL.get(token, 1) for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(TOKENS.index("<|start|>"))
    writer.add_eos_token_id(TOKENS.index("<|im_end|>"))
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template("{{ messages[0].content }}")


def head_dim(model: PreTrainedModel) -> int:
    return int(getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads)


def _value_type(value: Any) -> Any:
    from gguf import GGUFValueType

    return GGUFValueType.get_type(value)
