"""A complete checkpoint folder of a tiny random V3 model with a byte-level tokenizer and a chat template, seeded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvern.checkpoint.save import save_model
from kvern.config import ModelConfig
from kvern.model import Transformer

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEXT = ["def add(a, b):\n    return a + b\n", "the cat sat on the mat"] * 10
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
PADDED_VOCABULARY = 320
CONTEXT = 256


TINY: dict[str, Any] = {
    "vocab_size": PADDED_VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": CONTEXT,
    "torch_dtype": "float32",
}
"""config.json of two layers, one of them MoE; the vocabulary is padded."""


def tiny_config(**changes: Any) -> ModelConfig:
    """TINY, with changes."""
    return ModelConfig(**{**TINY, **changes})


def tiny_model(config: ModelConfig) -> Transformer:
    """Random weights, always the same."""
    model = Transformer(config, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model.eval()


def write_tiny_checkpoint(folder: Path) -> Path:
    """Write the checkpoint and return its folder."""
    config = tiny_config()
    save_model(tiny_model(config), folder, config=config, files=text_files())
    return folder


def text_files() -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, generation_config.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<|start|>", "<|end|>", *FIM])
    config = {"bos_token": "<|start|>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "generation_config.json": b'{"temperature": 0.7, "top_p": 0.8}',
    }
