"""Writes the synthetic checkpoint `base`: a V3 of 1.9 billion random parameters that every engine can read.

    linear ~ N(0, 1/inputs)    gate ~ N(0, 2.25/inputs)    head ~ N(0, 9/inputs)    norms ~ U(0.8, 1.2)

Random weights give up meaning, not speed: every token routes to eight of 96 experts of its own, as real text would.
Each tensor has a seed of its own, made from its name, so the folder is the same on every machine and a cut run resumes.
The tokenizer is a dummy (bytes, padding, and the one merge without which llama.cpp reads no BPE vocabulary).
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvern.checkpoint.save import PlannedTensor, plan_shards, write_checkpoint
from kvern.config import ModelConfig
from kvern.config.rope import RopeScaling
from kvern.model import Transformer

SHARD_BYTES = 1_000_000_000
BOS, EOS = "<bos>", "<eos>"

BASE = ModelConfig(
    vocab_size=16384,
    hidden_size=1536,
    intermediate_size=4096,
    moe_intermediate_size=256,
    num_hidden_layers=16,
    num_attention_heads=12,
    q_lora_rank=768,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=96,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    max_position_embeddings=163840,
    rope_scaling=RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
    bos_token_id=0,
    eos_token_id=(1,),
)


def write(folder: Path, config: ModelConfig = BASE) -> Path:
    """Write (or finish) the BF16 checkpoint and return its folder; does nothing when it is complete."""
    model = Transformer(config, device="meta")
    tensors = [_planned(name, tensor) for name, tensor in model.state_dict().items()]
    write_checkpoint(
        folder,
        config,
        plan_shards(tensors, SHARD_BYTES),
        files=tokenizer_files(config.vocab_size),
        source="synthetic, seeded by tensor names, version 1",
    )
    return folder


def random_tensor(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor of this name, by the formula above."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if name.endswith("norm.weight"):
        return torch.empty(shape).uniform_(0.8, 1.2, generator=generator).to(dtype)
    if name.endswith("e_score_correction_bias"):
        return (torch.randn(shape, generator=generator) * 0.05).to(dtype)
    return (torch.randn(shape, generator=generator) * _deviation(name, shape)).to(dtype)


def _deviation(name: str, shape: tuple[int, ...]) -> float:
    if name.endswith("embed_tokens.weight"):
        return 1.0
    factor = {"lm_head.weight": 3.0}.get(name, 1.5 if name.endswith("mlp.gate.weight") else 1.0)
    return factor / math.sqrt(shape[-1])


def tokenizer_files(vocabulary: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE with `vocabulary` entries, at least 259."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first, second = alphabet[:2]
    tokens = [BOS, EOS, *alphabet, first + second]
    tokens += [f"<pad{number}>" for number in range(vocabulary - len(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=[(first, second)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def _planned(name: str, tensor: torch.Tensor) -> PlannedTensor:
    dtype, shape = tensor.dtype, tuple(tensor.shape)
    return PlannedTensor(name, dtype, shape, lambda: random_tensor(name, dtype, shape))
