"""The official V3 layout written out by hand, and small checkpoints in it that the safetensors library writes.

Independent of Kvern's model and writer: names, shapes and dtypes are those of the released checkpoint's headers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvern.config import ModelConfig, QuantizationConfig, RopeScaling

FP8 = torch.float8_e4m3fn


def tiny_config(*, fp8: bool = False) -> ModelConfig:
    """Three layers (one dense) and MTP; no size is a multiple of 128, so that every FP8 block grid is ragged."""
    return ModelConfig(
        vocab_size=320,
        hidden_size=192,
        intermediate_size=320,
        moe_intermediate_size=160,
        num_hidden_layers=3,
        num_nextn_predict_layers=1,
        num_attention_heads=4,
        n_shared_experts=1,
        n_routed_experts=8,
        routed_scaling_factor=2.5,
        kv_lora_rank=96,
        q_lora_rank=80,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=48,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        max_position_embeddings=4096 * 40,
        rope_scaling=RopeScaling("yarn", 40.0, 4096, 32, 1, 1.0, 1.0),
        eos_token_id=(1,),
        quantization_config=QuantizationConfig() if fp8 else None,
    )


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every Linear that the official FP8 checkpoint stores in FP8: module name -> (rows, columns)."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in (*_attention(config), *_mlp(config, layer))
    }


def _attention(c: ModelConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    heads, qk = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
    assert c.q_lora_rank is not None
    yield "self_attn.q_a_proj", (c.q_lora_rank, c.hidden_size)
    yield "self_attn.q_b_proj", (heads * qk, c.q_lora_rank)
    yield "self_attn.kv_a_proj_with_mqa", (c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size)
    yield "self_attn.kv_b_proj", (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    yield "self_attn.o_proj", (c.hidden_size, heads * c.v_head_dim)


def _mlp(c: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, int]]]:
    def block(prefix: str, width: int) -> Iterator[tuple[str, tuple[int, int]]]:
        yield f"{prefix}.gate_proj", (width, c.hidden_size)
        yield f"{prefix}.up_proj", (width, c.hidden_size)
        yield f"{prefix}.down_proj", (c.hidden_size, width)

    if layer < c.first_k_dense_replace:
        yield from block("mlp", c.intermediate_size)
        return
    assert c.n_routed_experts is not None
    assert c.n_shared_experts is not None
    for expert in range(c.n_routed_experts):
        yield from block(f"mlp.experts.{expert}", c.moe_intermediate_size)
    yield from block("mlp.shared_experts", c.moe_intermediate_size * c.n_shared_experts)


def other_shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Everything else: tensor name -> (shape, dtype)."""
    c, bf16 = config, torch.bfloat16
    assert c.q_lora_rank is not None
    assert c.n_routed_experts is not None
    out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        out[name] = (c.vocab_size, c.hidden_size), bf16
    out["model.norm.weight"] = (c.hidden_size,), bf16
    for layer in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        at = f"model.layers.{layer}"
        out[f"{at}.input_layernorm.weight"] = (c.hidden_size,), bf16
        out[f"{at}.post_attention_layernorm.weight"] = (c.hidden_size,), bf16
        out[f"{at}.self_attn.q_a_layernorm.weight"] = (c.q_lora_rank,), bf16
        out[f"{at}.self_attn.kv_a_layernorm.weight"] = (c.kv_lora_rank,), bf16
        if layer >= c.first_k_dense_replace:
            out[f"{at}.mlp.gate.weight"] = (c.n_routed_experts, c.hidden_size), bf16
            out[f"{at}.mlp.gate.e_score_correction_bias"] = (c.n_routed_experts,), torch.float32
        if layer >= c.num_hidden_layers:
            out[f"{at}.embed_tokens.weight"] = (c.vocab_size, c.hidden_size), bf16
            out[f"{at}.shared_head.head.weight"] = (c.vocab_size, c.hidden_size), bf16
            out[f"{at}.shared_head.norm.weight"] = (c.hidden_size,), bf16
            out[f"{at}.enorm.weight"] = (c.hidden_size,), bf16
            out[f"{at}.hnorm.weight"] = (c.hidden_size,), bf16
            out[f"{at}.eh_proj.weight"] = (c.hidden_size, 2 * c.hidden_size), bf16
    return out


def official_layout(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """All tensors of the FP8 checkpoint: name -> (shape, dtype)."""
    out = other_shapes(config)
    for name, (rows, columns) in linear_shapes(config).items():
        out[f"{name}.weight"] = (rows, columns), FP8
        out[f"{name}.weight_scale_inv"] = (math.ceil(rows / 128), math.ceil(columns / 128)), torch.float32
    return out


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A seeded BF16 checkpoint (F32 gate bias)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], std: float, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    tensors = {f"{name}.weight": normal(shape, 0.06).bfloat16() for name, shape in linear_shapes(config).items()}
    for name, (shape, dtype) in other_shapes(config).items():
        norm = "norm" in name.rsplit(".", 2)[-2]
        tensors[name] = normal(shape, 0.1 if norm else 0.06, 1.0 if norm else 0.0).to(dtype)
    head, embedding = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        tensors[f"model.layers.{layer}.embed_tokens.weight"] = embedding.clone()
        tensors[f"model.layers.{layer}.shared_head.head.weight"] = head.clone()
    return tensors


def quantize_by_loop(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 128x128 formula, block by block: the plain reading of the report."""
    rows, columns = weight.shape
    quantized = torch.empty(rows, columns, dtype=FP8)
    scale = torch.empty(math.ceil(rows / 128), math.ceil(columns / 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            where = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
            block = weight[where].float()
            scale[i, j] = block.abs().max() / 448
            quantized[where] = (block / scale[i, j]).to(FP8)
    return quantized, scale


def quantized_tensors(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The FP8 form of a BF16 checkpoint, by the loop."""
    out = dict(tensors)
    for name in linear_shapes(config):
        out[f"{name}.weight"], out[f"{name}.weight_scale_inv"] = quantize_by_loop(tensors[f"{name}.weight"])
    return out


def write_folder(folder: Path, config: ModelConfig, tensors: dict[str, torch.Tensor], shards: int = 3) -> Path:
    """Write with the safetensors library: `shards` files with an index, or one file without."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors, key=lambda name: name.removesuffix("_scale_inv"))
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
