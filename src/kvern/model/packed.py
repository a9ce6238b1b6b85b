"""The same model over packed weights: every layer is one native call (see ops.packed).

`PackedTransformer` takes what `Transformer` takes and gives the same numbers, up to rounding: what flows between
layers is FP32 here, and a row of the result never depends on the rest of the batch. `Transformer` stays the
specification. Weights come from a `PackedWeights`: packed on the spot, or mapped from a file that keeps them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor

from kvern.config import ModelConfig
from kvern.errors import KvernError
from kvern.model.attention import LATENT_EPS, Attention, split_forms
from kvern.model.batch import ForwardBatch, PagedLatents
from kvern.model.layer import DecoderLayer
from kvern.model.linear import MLP, Linear
from kvern.model.moe import MoE
from kvern.model.mtp import MTPLayer
from kvern.model.transformer import Transformer
from kvern.ops import packed
from kvern.ops.library import CODES, ROW_CODES
from kvern.ops.reference import BLOCK


class PackedWeights(Protocol):
    """Where packed weights come from."""

    def get(self, name: str, make: Callable[[], packed.Packed]) -> packed.Packed:
        """The weight of that name; `make` packs it where there is none yet."""


class PackedNow:
    """Packs every weight into memory when it is asked for."""

    def get(self, name: str, make: Callable[[], packed.Packed]) -> packed.Packed:
        """Pack."""
        return make()


@dataclass(frozen=True)
class PackedLayer:
    """A layer's C struct, and whatever it points into."""

    struct: packed.Layer
    kept: tuple[object, ...]


class PackedTransformer:
    """`packed_model(batch)` gives logits, as `Transformer` does; `model` is what it was packed from."""

    def __init__(self, model: Transformer, weights: PackedWeights) -> None:
        self.model, self.config = model, model.config
        self.activation_dtype = model.activation_dtype
        self.layers: Layers = PackedLayers(
            [
                pack_layer(layer, self.config, f"model.layers.{index}", weights)
                for index, layer in enumerate(model.model.layers)
            ]
        )
        self.norm = model.model.norm.weight.float()
        self.head = _linear(model.lm_head, "lm_head", weights)
        self._head_struct = self.head.struct()
        self.mtp_parts = [
            self._mtp_parts(layer, f"model.layers.{index}", weights)
            for index, layer in enumerate(model.model.layers)
            if isinstance(layer, MTPLayer)
        ]
        self.counters: Tensor | None = None
        """[len(packed.COUNTERS)] int64: where set, each step adds to it."""

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Logits [L, vocab_size] float32 of the tokens `batch.logits_at`, of all when that is None."""
        step = self._run(batch)
        rows = torch.arange(len(batch.tokens)) if batch.logits_at is None else batch.logits_at
        return self._head(self._head_struct, self.norm, self.config.rms_norm_eps, step, rows)[1]

    @property
    def has_mtp(self) -> bool:
        """Whether an MTP layer was loaded."""
        return self.model.has_mtp

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, hidden] float32 after `model.norm`."""
        step = self._run(batch)
        rows = torch.arange(len(batch.tokens))
        return self._head(None, self.norm, self.config.rms_norm_eps, step, rows)[0]

    def with_hidden(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """(hidden states [T, hidden] float32 after `model.norm`, logits as above), in one pass."""
        step = self._run(batch)
        norm, eps, every = self.norm, self.config.rms_norm_eps, torch.arange(len(batch.tokens))
        if batch.logits_at is None or torch.equal(batch.logits_at, every):
            return self._head(self._head_struct, norm, eps, step, every)
        hidden_TE = self._head(None, norm, eps, step, every)[0]
        return hidden_TE, packed.multiply(hidden_TE[batch.logits_at], self.head, activations=self.activation_dtype)

    def mtp(self, hidden_TE: Tensor, batch: ForwardBatch, depth: int = 0) -> tuple[Tensor, Tensor]:
        """As `Transformer.mtp`: (states [T, hidden], logits [L, vocab_size]) float32 of the tokens i + 2."""
        index = self.config.num_hidden_layers + depth
        layer = self.model.model.layers[index]
        assert isinstance(layer, MTPLayer)
        embedded = layer.enorm(layer.embed_tokens(batch.tokens).float())
        joined = torch.cat([embedded, layer.hnorm(hidden_TE.float())], dim=-1)
        join, head = self.mtp_parts[depth]
        x_TE = packed.multiply(joined, join, activations=self.activation_dtype)
        step = self._step(batch, x_TE)
        packed.begin_step(step.struct, self.model.model.frequencies, self.model.model.rotation_factor)
        self.layers(step, index, 1)
        norm, every = layer.shared_head.norm, torch.arange(len(batch.tokens))
        states = self._head(None, norm.weight.float(), norm.eps, step, every)[0]
        wanted = states if batch.logits_at is None else states[batch.logits_at]
        return states, packed.multiply(wanted, head, activations=self.activation_dtype)

    def _mtp_parts(self, layer: MTPLayer, name: str, weights: PackedWeights) -> tuple[packed.Packed, packed.Packed]:
        """eh_proj and the head, which checkpoints store as a copy of the main one."""
        join = _linear(layer.eh_proj, f"{name}.eh_proj", weights)
        own, main = layer.shared_head.head, self.model.lm_head
        is_copy = (
            own.dtype == main.dtype and own.weight is not None and torch.equal(_bytes(own.weight), _bytes(main.weight))
        )
        return join, self.head if is_copy else _linear(own, f"{name}.shared_head.head", weights)

    def _run(self, batch: ForwardBatch) -> PackedStep:
        """All decoder layers; what flows between them is left in the step."""
        step = self._step(batch, torch.empty(len(batch.tokens), self.config.hidden_size))
        decoder = self.model.model
        table = decoder.embed_tokens.weight
        packed.begin_step(step.struct, decoder.frequencies, decoder.rotation_factor, table, batch.tokens)
        self.layers(step, 0, self.config.num_hidden_layers)
        return step

    def _head(
        self, head: packed.Weight | None, norm: Tensor, eps: float, step: PackedStep, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        return packed.run_head(head, norm, eps, step.struct, self.config.hidden_size, rows)

    def _step(self, batch: ForwardBatch, x_TE: Tensor) -> PackedStep:
        pages = Pages.of(batch, self.config, self.activation_dtype)
        rotation = torch.empty(len(batch.tokens), self.config.qk_rope_head_dim)
        slots = torch.empty(len(batch.tokens), dtype=torch.int64)
        expanded = split_forms(self.config, batch)[1]
        flags = None
        if expanded:
            flags = torch.zeros(len(batch.query_starts) - 1, dtype=torch.uint8)
            flags[list(expanded)] = 1
        kept = (x_TE, rotation, slots, pages.tables, pages.contexts, pages.starts, flags)
        struct = packed.Step(
            len(batch.tokens),
            *(packed.address(one) for one in kept),
            pages.tables.shape[1],
            len(pages.contexts),
            pages.block_size,
            pages.rows.shape[1],
            pages.rows.stride(1),
            ROW_CODES[pages.rows.dtype],
            CODES[self.activation_dtype],
            packed.address(self.counters),
        )
        return PackedStep(struct, pages, slots, kept)


class Layers(Protocol):
    """Runs decoder layers."""

    def __call__(self, step: PackedStep, first: int, count: int) -> None:
        """Layers first .. first + count - 1: step.x += attention; step.x += feed_forward, latents to the cache."""


class PackedLayers:
    """All layers' C structs in one array, so that a step is one call."""

    def __init__(self, layers: Sequence[PackedLayer]) -> None:
        self._array = (packed.Layer * len(layers))(*(layer.struct for layer in layers))
        self._kept = layers

    def __call__(self, step: PackedStep, first: int, count: int) -> None:
        """See Layers."""
        pages = step.pages
        rows = pages.rows.data_ptr() + first * pages.layer_bytes
        packed.run_layers(self._array, first, count, step.struct, rows, pages.layer_bytes)


@dataclass(frozen=True)
class PackedStep:
    """A step's C struct, the books of its cache, the cache row of each token, and what else the struct points into."""

    struct: packed.Step
    pages: Pages
    slots: Tensor
    kept: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Pages:
    """The books of a batch's cache (see PagedLatents); rows of all layers, or of one [1, N, D] that all share."""

    tables: Tensor
    contexts: Tensor
    starts: Tensor
    block_size: int
    rows: Tensor

    @classmethod
    def of(cls, batch: ForwardBatch, config: ModelConfig, dtype: torch.dtype) -> Pages:
        """Those of `batch.cache`, which must be a paged one; for a batch without one, pages of one row in memory."""
        if batch.cache is None:
            return cls._alone(batch, config, dtype)
        cache = cast(PagedLatents, batch.cache)
        return cls(cache.tables, cache.contexts, cache.starts, cache.block_size, cache.rows)

    @classmethod
    def _alone(cls, batch: ForwardBatch, config: ModelConfig, dtype: torch.dtype) -> Pages:
        starts = torch.tensor(batch.query_starts, dtype=torch.int32)
        tables = torch.zeros(len(starts) - 1, batch.longest, dtype=torch.int32)
        for row, (first, last) in enumerate(pairwise(batch.query_starts)):
            tables[row, : last - first] = torch.arange(first, last)
        count = len(batch.tokens)
        rows = torch.empty(1, count, config.latent_dim, dtype=dtype)
        return cls(tables, starts.diff(), starts, 1, rows)

    @property
    def layer_bytes(self) -> int:
        """From the rows of one layer to those of the next."""
        return self.rows.stride(0) * self.rows.element_size() if len(self.rows) > 1 else 0


def pack_layer(layer: torch.nn.Module, config: ModelConfig, name: str, weights: PackedWeights) -> PackedLayer:
    """The C struct of a decoder layer; `name` is its prefix in the checkpoint."""
    assert isinstance(layer, DecoderLayer)
    attention = layer.self_attn
    kept: list[object] = []
    struct = packed.Layer(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        value=config.v_head_dim,
        rank=config.kv_lora_rank,
        q_rank=config.q_lora_rank or 0,
        norm_eps=config.rms_norm_eps,
        latent_eps=LATENT_EPS,
        softmax_scale=config.softmax_scale,
    )

    def number(field: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            dense = tensor.float().contiguous()
            kept.append(dense)
            setattr(struct, field, dense.data_ptr())

    def weight(field: str, module: Linear, where: str) -> None:
        kept.append(one := _linear(module, f"{name}.self_attn.{where}", weights))
        setattr(struct, field, one.struct())
        number(f"{field}_bias" if field != "o_proj" else "o_bias", module.bias)

    number("input_norm", layer.input_layernorm.weight)
    number("post_norm", layer.post_attention_layernorm.weight)
    number("kv_norm", attention.kv_a_layernorm.weight)
    if config.q_lora_rank is None:
        weight("q_a", attention.q_proj, "q_proj")
    else:
        weight("q_a", attention.q_a_proj, "q_a_proj")
        number("q_norm", attention.q_a_layernorm.weight)
        kept.append(q_b := _linear(attention.q_b_proj, f"{name}.self_attn.q_b_proj", weights))
        struct.q_b = q_b.struct()
    weight("kv_a", attention.kv_a_proj_with_mqa, "kv_a_proj_with_mqa")
    weight("o_proj", attention.o_proj, "o_proj")
    kept.append(_put_heads(struct, attention, f"{name}.self_attn.kv_b_proj", weights))
    kept.append(_put_experts(struct, layer.mlp, config, f"{name}.mlp", weights))
    if isinstance(layer.mlp, MoE):
        number("gate_bias", layer.mlp.gate.e_score_correction_bias)
    packed.check_layer(struct)
    return PackedLayer(struct, tuple(kept))


def _put_heads(struct: packed.Layer, attention: Attention, name: str, weights: PackedWeights) -> object:
    """kv_b_proj head by head: Wuk both ways round, and Wuv."""
    config = attention.config
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    heads = [head * (nope + value) for head in range(config.num_attention_heads)]
    keys = _HeadRows(attention.kv_b_proj, [slice(first, first + nope) for first in heads])
    values = _HeadRows(attention.kv_b_proj, [slice(first + nope, first + nope + value) for first in heads])
    kept = []
    for field, rows, turned in (("absorb", keys, True), ("keys", keys, False), ("values", values, False)):
        if field != "values" and not nope:
            continue
        packs = [
            weights.get(f"{name}.{field}.{head}", partial(rows.pack, head, turned))
            for head in range(config.num_attention_heads)
        ]
        setattr(struct, field, array := packed.array(packs))
        kept.append((array, packs))
    return kept


class _HeadRows:
    """The rows of kv_b_proj that belong to each head, or their transpose, all packed in one kind.

    That is as they are stored, unless some head's rows cross a border of scale blocks, or E4M3 holds a NaN: then FP32.
    """

    def __init__(self, linear: Linear, rows: Sequence[slice]) -> None:
        self.linear, self.rows = linear, rows

    def pack(self, head: int, turned: bool) -> packed.Packed:
        """The rows of `head` [count, rank], or [rank, count] when `turned`."""
        rows = self.rows[head]
        words, groups = self.linear.weight_packed, self.linear.weight_scale
        if words is not None and groups is not None and not self._are_picks:
            return (packed.pack_int4_turned if turned else packed.pack_int4)(words[rows], groups[rows])
        weight, scale = self._stored
        blocks = None if scale is None else scale[rows.start // BLOCK : (rows.stop - 1) // BLOCK + 1]
        if turned:
            return packed.pack(weight[rows].T.contiguous(), None if blocks is None else blocks.T.contiguous())
        return packed.pack(weight[rows], blocks, find_picks=self._are_picks)

    @cached_property
    def _stored(self) -> tuple[Tensor, Tensor | None]:
        weight, scale = self.linear.weight, self.linear.weight_scale_inv
        if weight is None:
            return self.linear.dense(torch.float32), None
        crosses = any(one.start % BLOCK and one.start // BLOCK != (one.stop - 1) // BLOCK for one in self.rows)
        if scale is not None and (crosses or bool((weight.view(torch.uint8) & 0x7F == 0x7F).any())):
            return self.linear.dense(torch.float32), None
        return weight, scale

    @cached_property
    def _are_picks(self) -> bool:
        return all(packed.is_selection(self._stored[0][rows]) for rows in self.rows)


def _bytes(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return weight.view(torch.uint8)


def _turned(matrix: Tensor, turned: bool) -> Tensor:
    return matrix.T.contiguous() if turned else matrix


def _put_experts(
    struct: packed.Layer, mlp: torch.nn.Module, config: ModelConfig, name: str, weights: PackedWeights
) -> object:
    if isinstance(mlp, MLP):
        experts, struct.common = [_expert(mlp, name, weights)], 1
        kept: list[object] = []
    else:
        assert isinstance(mlp, MoE)
        shared = (
            [_expert(mlp.shared_experts, f"{name}.shared_experts", weights)] if hasattr(mlp, "shared_experts") else []
        )
        routed = [_expert(one, f"{name}.experts.{index}", weights) for index, one in enumerate(mlp.experts)]
        experts, struct.common, struct.routed = [*shared, *routed], len(shared), len(routed)
        struct.top_k, struct.groups, struct.kept_groups = config.num_experts_per_tok, config.n_group, config.topk_group
        struct.normalise, struct.factor = int(config.norm_topk_prob), config.routed_scaling_factor
        gate = weights.get(f"{name}.gate", lambda: packed.pack(mlp.gate.weight))
        struct.gate, kept = gate.struct(), [gate]
    array = (packed.Expert * len(experts))(*(packed.Expert(*(one.struct() for one in parts)) for parts in experts))
    struct.experts = ctypes.cast(array, ctypes.POINTER(packed.Expert))
    return [*kept, array, experts]


def _expert(mlp: torch.nn.Module, name: str, weights: PackedWeights) -> tuple[packed.Packed, ...]:
    assert isinstance(mlp, MLP)
    parts = (("gate_proj", mlp.gate_proj), ("up_proj", mlp.up_proj), ("down_proj", mlp.down_proj))
    return tuple(_linear(linear, f"{name}.{part}", weights) for part, linear in parts)


def _linear(linear: Linear, name: str, weights: PackedWeights) -> packed.Packed:
    def make() -> packed.Packed:
        if linear.weight_packed is not None:
            assert linear.weight_scale is not None
            return packed.pack_int4(linear.weight_packed, linear.weight_scale)
        assert linear.weight is not None
        return packed.pack(linear.weight, linear.weight_scale_inv, find_picks=name.endswith("q_b_proj"))

    one = weights.get(name, make)
    if (one.n, one.k) != (linear.outputs, linear.inputs):
        raise KvernError(f"packed weight {name} is {one.n} x {one.k}, the model's {linear.outputs} x {linear.inputs}")
    return one
