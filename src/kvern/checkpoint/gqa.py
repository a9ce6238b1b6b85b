"""Writes a Llama- or Qwen2-family model as the DeepSeek-V3 model that computes the same function.

With n kv heads of size d and R = n * d, grouped-query attention is latent attention with
    kv_lora_rank = qk_rope_head_dim = R, qk_nope_head_dim = 0, v_head_dim = d, q_lora_rank = heads * d
    kv_a_proj_with_mqa = [delta * v_proj ; k_proj in interleaved pairs]     kv_b_proj: picks a head's kv head (0 and 1)
    q_a_proj           = delta * q_proj                                     q_b_proj:  puts head h into the rope slots
                                                                            of its kv head (0 and 1)
and the two norms between them are linear: with delta = 2^-24 the mean square of a latent c is far below eps, so
    c / sqrt(mean(c^2) + eps) * sqrt(eps) / delta = c / delta                up to 1e-8 relative for values around 1.
The norm of the queries also carries sqrt(R / d), which turns the softmax scale R^-1/2 into d^-1/2, and any factor that
the source's YaRN puts on the scores. Frequencies, scaled or not, become a longrope list of R / 2 entries.

Gives up: bytes. q_b_proj and kv_b_proj are read for every token and were not there (`import_cost`); the latent norms
must stay F32, and delta underflows in FP16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from kvern.checkpoint.gqa_source import GQAShape, SourceModel, read_shape
from kvern.checkpoint.quantize import BLOCK, FP8, QuantizedWeight, Rows, scale_shape
from kvern.checkpoint.save import PlannedTensor
from kvern.config import ModelConfig, QuantizationConfig, RopeScaling
from kvern.errors import CheckpointError, UnsupportedModelError

DELTA = 2.0**-24
LATENT_NORM_EPS = 1e-6
"""The eps of the two latent norms: fixed in the official code and in transformers, whatever `rms_norm_eps` says."""

DType = Literal["f32", "bf16", "fp8"]
_STORAGE = {"f32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def plan_import(source: SourceModel, dtype: DType) -> tuple[ModelConfig, list[PlannedTensor]]:
    """The V3 configuration of `source` and its tensors, each made on demand from at most two tensors of the source.

    `dtype` is the storage of the weights: F32, BF16, or FP8 E4M3 with 128x128 scales (embedding, head, norms and biases
    BF16). Raises UnsupportedModelError naming the field or tensor that V3 cannot express, CheckpointError for a
    tensor that is missing or has another shape than config.json implies.
    """
    if dtype not in _STORAGE:
        raise UnsupportedModelError(f"cannot import to {dtype!r}", hint="one of f32, bf16, fp8", param="dtype")
    shape = read_shape(source.config)
    config = imported_config(shape, dtype)
    _check_names(source, shape)
    return config, list(_Plan(source, shape, config).tensors())


def imported_config(shape: GQAShape, dtype: DType) -> ModelConfig:
    """The V3 configuration that computes what a grouped-query model of this shape computes."""
    rank = shape.latent_rank
    mixed_blocks = ("kv_a_proj_with_mqa",) if rank % BLOCK else ()
    return ModelConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        first_k_dense_replace=shape.layers,
        num_nextn_predict_layers=0,
        num_attention_heads=shape.heads,
        q_lora_rank=shape.q_rank,
        kv_lora_rank=rank,
        qk_rope_head_dim=rank,
        qk_nope_head_dim=0,
        v_head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        rms_norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        rope_scaling=_longrope(shape),
        attention_bias=shape.qkv_bias,
        bos_token_id=shape.bos_token_id,
        eos_token_id=shape.eos_token_id,
        torch_dtype="float32" if dtype == "f32" else "bfloat16",
        quantization_config=QuantizationConfig(modules_to_not_convert=mixed_blocks) if dtype == "fp8" else None,
    )


def _longrope(shape: GQAShape) -> RopeScaling:
    """One factor a frequency: V3 rotates pair i by theta^(-2i/R) / factor_i, the source by its own frequencies."""
    rank = shape.latent_rank
    wanted = shape.inv_freq * shape.kv_heads
    factors = tuple(shape.rope_theta ** (-2 * pair / rank) / frequency for pair, frequency in enumerate(wanted))
    return RopeScaling(
        type="longrope",
        factor=1.0,
        original_max_position_embeddings=shape.max_position_embeddings,
        short_factor=factors,
        long_factor=factors,
        attention_factor=1.0,
    )


def interleaved_rows(heads: int, head_dim: int) -> torch.Tensor:
    """For each interleaved row, the half-split row that belongs there: (0, d/2, 1, d/2 + 1, ...) in every head.

    Returns int64 [heads * head_dim]. Half-split rotates rows (j, j + d/2) together, interleaved rows (2j, 2j + 1).
    """
    return torch.arange(heads * head_dim).view(heads, 2, head_dim // 2).transpose(1, 2).reshape(-1)


def query_scatter(heads: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    """q_b_proj: float32 [heads * R, heads * d] of 0 and 1, head h into the interleaved rope slots of its kv head."""
    rank = kv_heads * head_dim
    within = interleaved_rows(1, head_dim)
    scatter = torch.zeros(heads, rank, heads, head_dim)
    for head in range(heads):
        first = head // (heads // kv_heads) * head_dim
        scatter[head, first + torch.arange(head_dim), head, within] = 1.0
    return scatter.view(heads * rank, heads * head_dim)


def value_pick(heads: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    """kv_b_proj: float32 [heads * d, R] of 0 and 1, every head's values are its kv head's slice of the latent."""
    pick = torch.zeros(heads, head_dim, kv_heads, head_dim)
    for head in range(heads):
        pick[head, :, head // (heads // kv_heads)] = torch.eye(head_dim)
    return pick.view(heads * head_dim, kv_heads * head_dim)


class _Plan:
    """Walks the V3 model in the order of its layers and says where each tensor comes from."""

    def __init__(self, source: SourceModel, shape: GQAShape, config: ModelConfig) -> None:
        self.source, self.shape, self.config = source, shape, config
        self.storage = torch.float32 if config.torch_dtype == "float32" else torch.bfloat16

    def tensors(self) -> Iterator[PlannedTensor]:
        shape = self.shape
        embedding = (shape.vocab_size, shape.hidden_size)
        yield self._copied("model.embed_tokens.weight", embedding)
        for layer in range(shape.layers):
            yield from self._layer(f"model.layers.{layer}")
        yield self._copied("model.norm.weight", (shape.hidden_size,))
        yield self._copied("lm_head.weight", embedding, _head_name(shape))

    def _layer(self, layer: str) -> Iterator[PlannedTensor]:
        hidden, wide = self.shape.hidden_size, self.shape.intermediate_size
        yield self._copied(f"{layer}.input_layernorm.weight", (hidden,))
        yield from self._attention(f"{layer}.self_attn")
        yield self._copied(f"{layer}.post_attention_layernorm.weight", (hidden,))
        for name, size in (("gate_proj", (wide, hidden)), ("up_proj", (wide, hidden)), ("down_proj", (hidden, wide))):
            yield from self._linear(f"{layer}.mlp.{name}", size, [self._rows(f"{layer}.mlp.{name}.weight", size)])

    def _attention(self, attn: str) -> Iterator[PlannedTensor]:
        shape, heads = self.shape, (self.shape.heads, self.shape.kv_heads, self.shape.head_dim)
        rank, q_rank, hidden = shape.latent_rank, shape.q_rank, shape.hidden_size
        order = interleaved_rows(shape.kv_heads, shape.head_dim)
        queries = self._rows(f"{attn}.q_proj.weight", (q_rank, hidden), scale=DELTA)
        values = self._rows(f"{attn}.v_proj.weight", (rank, hidden), scale=DELTA)
        keys = self._rows(f"{attn}.k_proj.weight", (rank, hidden), order)
        linear_norm = math.sqrt(LATENT_NORM_EPS) / DELTA
        softmax = math.sqrt(rank / shape.head_dim) * shape.score_factor
        yield from self._linear(f"{attn}.q_a_proj", (q_rank, hidden), [queries])
        yield _constant(f"{attn}.q_a_layernorm.weight", q_rank, linear_norm * softmax)
        yield from self._selection(f"{attn}.q_b_proj", (shape.heads * rank, q_rank), partial(query_scatter, *heads))
        yield from self._linear(f"{attn}.kv_a_proj_with_mqa", (2 * rank, hidden), [values, keys])
        yield _constant(f"{attn}.kv_a_layernorm.weight", rank, linear_norm)
        yield from self._selection(f"{attn}.kv_b_proj", (q_rank, rank), partial(value_pick, *heads))
        output = self._rows(f"{attn}.o_proj.weight", (hidden, q_rank))
        yield from self._linear(f"{attn}.o_proj", (hidden, q_rank), [output])
        if shape.qkv_bias:
            yield from self._biases(attn, order)

    def _biases(self, attn: str, order: torch.Tensor) -> Iterator[PlannedTensor]:
        shape, rank, q_rank = self.shape, self.shape.latent_rank, self.shape.q_rank
        queries = self._rows(f"{attn}.q_proj.bias", (q_rank,), scale=DELTA)
        values = self._rows(f"{attn}.v_proj.bias", (rank,), scale=DELTA)
        keys = self._rows(f"{attn}.k_proj.bias", (rank,), order)
        output = Rows(partial(torch.zeros, shape.hidden_size))
        if shape.o_bias:
            output = self._rows(f"{attn}.o_proj.bias", (shape.hidden_size,))
        yield self._joined(f"{attn}.q_a_proj.bias", (q_rank,), [queries])
        yield self._joined(f"{attn}.kv_a_proj_with_mqa.bias", (2 * rank,), [values, keys])
        yield self._joined(f"{attn}.o_proj.bias", (shape.hidden_size,), [output])

    def _rows(self, name: str, size: tuple[int, ...], order: torch.Tensor | None = None, scale: float = 1.0) -> Rows:
        def make() -> torch.Tensor:
            rows = self._read(name, size)
            return rows if order is None else rows[order]

        return Rows(make, scale)

    def _read(self, name: str, size: tuple[int, ...]) -> torch.Tensor:
        tensor = self.source.tensor(name)
        if tuple(tensor.shape) != size:
            raise CheckpointError(f"shape {list(tensor.shape)}, config.json implies {list(size)}", tensor=name)
        return tensor.float()

    def _copied(self, name: str, size: tuple[int, ...], source_name: str | None = None) -> PlannedTensor:
        return self._joined(name, size, [self._rows(source_name or name, size)])

    def _joined(self, name: str, size: tuple[int, ...], pieces: Sequence[Rows]) -> PlannedTensor:
        def make() -> torch.Tensor:
            made = [piece.scaled().to(self.storage) for piece in pieces]
            return made[0] if len(made) == 1 else torch.cat(made)

        return PlannedTensor(name, self.storage, size, make)

    def _linear(self, module: str, size: tuple[int, int], pieces: Sequence[Rows]) -> Iterator[PlannedTensor]:
        if not self._in_fp8(module):
            yield self._joined(f"{module}.weight", size, pieces)
            return
        quantized = QuantizedWeight(f"{module}.weight", pieces)
        yield PlannedTensor(f"{module}.weight", FP8, size, quantized.weight)
        yield PlannedTensor(f"{module}.weight_scale_inv", torch.float32, scale_shape(size), quantized.scale)

    def _selection(
        self, module: str, size: tuple[int, int], make: Callable[[], torch.Tensor]
    ) -> Iterator[PlannedTensor]:
        """A matrix of 0 and 1, exact in any dtype: in FP8 its scales are 1."""
        dtype = FP8 if self._in_fp8(module) else self.storage
        yield PlannedTensor(f"{module}.weight", dtype, size, lambda: make().to(dtype))
        if self._in_fp8(module):
            scales = scale_shape(size)
            yield PlannedTensor(f"{module}.weight_scale_inv", torch.float32, scales, partial(torch.ones, scales))

    def _in_fp8(self, module: str) -> bool:
        quantization = self.config.quantization_config
        return quantization is not None and quantization.covers(module)


def _constant(name: str, size: int, value: float) -> PlannedTensor:
    return PlannedTensor(name, torch.float32, (size,), partial(torch.full, (size,), value))


def _head_name(shape: GQAShape) -> str:
    return "model.embed_tokens.weight" if shape.tied_head else "lm_head.weight"


def source_names(shape: GQAShape) -> Iterator[str]:
    """Every tensor that a source model of this shape has, under its Hugging Face name."""
    yield from ("model.embed_tokens.weight", "model.norm.weight", _head_name(shape))
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield from (f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight")
        yield from (f"{prefix}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        for name in "qkvo":
            yield f"{prefix}.self_attn.{name}_proj.weight"
            if shape.o_bias if name == "o" else shape.qkv_bias:
                yield f"{prefix}.self_attn.{name}_proj.bias"


def _check_names(source: SourceModel, shape: GQAShape) -> None:
    """A missing tensor is damage; a tensor too many is maths that would be dropped."""
    unused = set(source.names())
    unused -= {name for name in unused if name.endswith("rotary_emb.inv_freq")}
    present = frozenset(unused)
    for name in source_names(shape):
        if name not in present:
            raise CheckpointError("tensor is missing", tensor=name)
        unused.discard(name)
    for name in sorted(unused - {"lm_head.weight"}):
        raise UnsupportedModelError(
            f"cannot import a model with the tensor {name}: nothing in a V3 layer computes it", param=name
        )


@dataclass(frozen=True)
class ImportCost:
    """Bytes read from memory for one token, in the source and in the import, both with BF16 weights."""

    source_bytes: int
    imported_bytes: int

    @property
    def ratio(self) -> float:
        return self.imported_bytes / self.source_bytes


def import_cost(hf_config: Mapping[str, Any]) -> ImportCost:
    """What the import costs: every weight matrix read for a token (layers and head; the embedding is one row)."""
    shape = read_shape(hf_config)
    hidden, rank, q_rank = shape.hidden_size, shape.latent_rank, shape.q_rank
    layer = 2 * q_rank * hidden + 2 * rank * hidden + 3 * shape.intermediate_size * hidden
    added = shape.heads * rank * q_rank + q_rank * rank
    head = shape.vocab_size * hidden
    source = 2 * (shape.layers * layer + head)
    return ImportCost(source, source + 2 * shape.layers * added)
