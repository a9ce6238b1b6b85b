"""Reads a GGUF file as the Llama or Qwen2 model it holds: Hugging Face config, names and row order, float32 tensors.

Tensors are dequantised one at a time, when asked for (every type that the `gguf` package knows: F32, F16, BF16, the
legacy and the K-quants). llama.cpp stores the query and key rows of `llama` files in interleaved pairs; they are put
back to half-split, so that an import sees one layout. Frequency factors (`rope_freqs.weight`, Llama 3.1) become a
longrope list. Gives up: architectures other than llama and qwen2, and big-endian files.

Source: the GGUF specification and llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize

from kvern.checkpoint.gguf_tokenizer import end_token_ids, tokenizer_files
from kvern.checkpoint.gqa import interleaved_rows
from kvern.errors import CheckpointError, UnsupportedModelError

ARCHITECTURES = ("llama", "qwen2")

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_MALFORMED = (ValueError, IndexError, KeyError, OverflowError, OSError)
"""What gguf's reader raises on damaged files."""


class _BoundedReader(GGUFReader):  # type: ignore[misc]  # gguf ships no complete types
    """gguf's reader, which slices past the end of the file without a word, made to notice."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray[Any, Any]:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"the file ends at byte {len(self.data):,}, its contents go on to {end:,}")
        found: np.ndarray[Any, Any] = super()._get(offset, dtype, count, override_order)
        return found


class GGUFSource:
    """A GGUF file as a `SourceModel`.

    Opening reads the metadata; raises CheckpointError, naming the file, when it is damaged, and UnsupportedModelError
    when it holds another architecture.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._reader = _open(self.path)
        self.architecture = self._read_architecture()
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._gguf_names = {_hf_name(name): name for name in self._tensors if name != _ROPE_FACTORS}

    def names(self) -> list[str]:
        """Hugging Face names; a tensor that llama and qwen2 models do not have keeps its own."""
        return list(self._gguf_names)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name` (Hugging Face) in float32, q and k rows half-split."""
        if name not in self._gguf_names:
            raise CheckpointError("tensor is missing", file=self.path, tensor=name)
        rows = self._dequantized(self._gguf_names[name])
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if self.architecture == "llama" and heads is not None:
            order = interleaved_rows(self.config[heads], self.config["head_dim"])
            if len(order) != len(rows):
                detail = f"{len(rows)} rows, the metadata implies {len(order)}"
                raise CheckpointError(detail, file=self.path, tensor=name)
            return rows[order.argsort()]
        return rows

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json of the Hugging Face model that this file was made from."""
        field = self._field
        hidden, heads = int(field("embedding_length")), int(field("attention.head_count"))
        if heads < 1:
            raise CheckpointError(f"attention.head_count is {heads}", file=self.path)
        head_dim = int(field("attention.key_length", hidden // heads)) or 1
        rotated = int(field("rope.dimension_count", head_dim))
        bos, ends = self._metadata("tokenizer.ggml.bos_token_id", None), end_token_ids(self._metadata)
        config: dict[str, Any] = {
            "model_type": self.architecture,
            "vocab_size": int(self._shape("token_embd.weight")[0]),
            "hidden_size": hidden,
            "intermediate_size": int(field("feed_forward_length")),
            "num_hidden_layers": int(field("block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(field("attention.head_count_kv", heads)),
            "head_dim": head_dim,
            "partial_rotary_factor": rotated / head_dim,
            "max_position_embeddings": int(field("context_length")),
            "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "num_local_experts": int(field("expert_count", 0)),
            "sliding_window": field("attention.sliding_window", None),
            "use_sliding_window": field("attention.sliding_window", None) is not None,
            "clip_qkv": field("attention.clamp_kqv", None),
            "attention_multiplier": field("attention.scale", None),
            "logits_scaling": field("logit_scale", None),
            "rope_parameters": {"rope_theta": field("rope.freq_base", 10000.0), **self._rope_scaling(head_dim)},
            "bos_token_id": bos,
            "eos_token_id": ends,
        }
        return config

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        """tokenizer.json, tokenizer_config.json and generation_config.json, written from the metadata."""
        ids = {key: self.config[key] for key in ("bos_token_id", "eos_token_id") if self.config[key] not in (None, [])}
        generation = json.dumps(ids, indent=2).encode()
        tokenizer = self.tokenizer_files(self.config["max_position_embeddings"])
        return {**tokenizer, "generation_config.json": generation}

    def tokenizer_files(self, context: int) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json for inputs of up to `context` tokens."""
        return tokenizer_files(self._metadata, context)

    def _rope_scaling(self, head_dim: int) -> dict[str, Any]:
        kind = self._field("rope.scaling.type", "none")
        factor = self._field("rope.scaling.factor", self._field("rope.scale_linear", 1.0))
        if _ROPE_FACTORS in self._tensors:
            if kind != "none":
                raise UnsupportedModelError(f"{self.path}: {_ROPE_FACTORS} together with rope.scaling.type {kind!r}")
            factors = self._dequantized(_ROPE_FACTORS).tolist()
            if len(factors) != head_dim // 2:
                raise CheckpointError(
                    f"{len(factors)} factors for {head_dim // 2} frequencies", file=self.path, tensor=_ROPE_FACTORS
                )
            scaling = {"short_factor": factors, "long_factor": factors, "factor": 1.0, "attention_factor": 1.0}
            return {"rope_type": "longrope", **scaling}
        if kind == "yarn":
            original = int(self._field("rope.scaling.original_context_length", self._field("context_length")))
            magnitude = self._field("rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(max(factor, 1.0)))
            return {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                "attention_factor": magnitude,
            }
        if kind not in ("none", "linear"):
            raise UnsupportedModelError(f"{self.path}: rope.scaling.type {kind!r} cannot be imported")
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else {"rope_type": "default"}

    def _read_architecture(self) -> str:
        architecture = self._metadata("general.architecture")
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{self.path}: general.architecture {architecture!r} cannot be imported",
                hint=f"importable are {', '.join(ARCHITECTURES)}",
            )
        return str(architecture)

    def _field(self, name: str, *default: Any) -> Any:
        """A value of the architecture's own metadata, which must be one value for all layers."""
        value = self._metadata(f"{self.architecture}.{name}", *default)
        if isinstance(value, list):
            raise UnsupportedModelError(f"{self.path}: {self.architecture}.{name} differs from layer to layer")
        return value

    def _metadata(self, key: str, *default: Any) -> Any:
        """A metadata value; floats in their shortest form, 1e-6. CheckpointError when it is missing without default."""
        field = self._reader.fields.get(key)
        if field is None:
            if default:
                return default[0]
            raise CheckpointError(f"metadata has no {key}", file=self.path)
        try:
            value = field.contents()
        except _MALFORMED as error:
            raise CheckpointError(f"metadata {key} is damaged: {error}", file=self.path) from error
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def _shape(self, gguf_name: str) -> tuple[int, ...]:
        if gguf_name not in self._tensors:
            raise CheckpointError("tensor is missing", file=self.path, tensor=gguf_name)
        return tuple(int(size) for size in reversed(self._tensors[gguf_name].shape))

    def _dequantized(self, gguf_name: str) -> torch.Tensor:
        tensor = self._tensors[gguf_name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UnsupportedModelError(
                f"{self.path}: {gguf_name}: type {tensor.tensor_type.name} cannot be dequantised"
            ) from None
        except ValueError as error:
            raise CheckpointError(str(error), file=self.path, tensor=gguf_name) from error
        owned = values if values.flags.writeable else values.copy()
        return torch.from_numpy(owned).float().view(self._shape(gguf_name))


def _open(path: Path) -> GGUFReader:
    try:
        reader = _BoundedReader(path)
    except _MALFORMED as error:
        detail = error.strerror if isinstance(error, OSError) else f"is damaged or no GGUF file: {error}"
        raise CheckpointError(str(detail), file=path) from error
    if reader.byte_order != "I":
        raise UnsupportedModelError(f"{path}: big-endian GGUF files are not supported")
    return reader


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names stay as they are."""
    if block := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        number, part, kind = block.groups()
        return f"model.layers.{number}.{_BLOCK[part]}.{kind}" if part in _BLOCK else name
    stem, _, kind = name.rpartition(".")
    return f"{_TOP[stem]}.{kind}" if stem in _TOP else name
