"""How many bytes a step must read, counted from what the model was really asked to compute.

    bytes of a step = every_step                      attention, norms, gates, dense and shared feed-forward, last norm
                    + head, if the step wanted logits
                    + tokens * one row of the embedding
                    + each routed expert that any of the step's tokens chose, once
                    + visible rows * one row of the cache, all layers; of each sequence, those its last token sees
    bytes per token = the sum over the steps / tokens computed (prefill) or drawn (decode)

Weights count in the dtype in which they lie in memory, block scales included, once a step however many sequences share
it. It is what a perfect implementation reads from memory: copies, activations and second reads of the same bytes are
not in it, so the GB/s that follow from it never flatter. Packed layers count for themselves, in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvern.engine.cache import row_bytes, rows_dtype
from kvern.engine.settings import CacheDtype
from kvern.model import ForwardBatch, Model, PackedTransformer, Transformer
from kvern.model.moe import MoE
from kvern.ops import packed


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights as they lie in memory. experts: [MoE layer][expert]."""

    every_step: int
    head: int
    embedding_row: int
    experts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: Transformer) -> Weights:
        """Count the parameters and buffers of the layers that decoding runs; MTP layers are not among them."""
        embedding = model.model.embed_tokens.weight
        experts = tuple(tuple(_bytes(expert) for expert in moe.experts) for moe in moe_layers(model))
        layers = model.model.layers[: model.config.num_hidden_layers]
        everything = sum(_bytes(layer) for layer in layers) + _bytes(model.model.norm)
        return cls(
            every_step=everything - sum(map(sum, experts)),
            head=_bytes(model.lm_head),
            embedding_row=embedding.shape[1] * embedding.element_size(),
            experts=experts,
        )


def moe_layers(model: Transformer) -> list[MoE]:
    """The routed feed-forwards in order."""
    layers = model.model.layers[: model.config.num_hidden_layers]
    return [layer.mlp for layer in layers if isinstance(layer.mlp, MoE)]


@dataclass
class Traffic:
    """What the forward passes did while `recorded` was on."""

    steps: int = 0
    heads: int = 0
    tokens: int = 0
    visible_rows: int = 0
    chosen: list[tuple[int, Tensor]] = field(default_factory=list)
    """(MoE layer, the experts that its tokens chose) of each pass."""

    def bytes(self, weights: Weights, cache_row: int) -> int:
        """The module's formula; `cache_row` is the bytes of one token's latents in all layers."""
        experts = 0
        for layer, chosen in self.chosen:
            used: set[int] = set(chosen.flatten().tolist())
            experts += sum(weights.experts[layer][expert] for expert in used)
        return (
            self.steps * weights.every_step
            + self.heads * weights.head
            + self.tokens * weights.embedding_row
            + experts
            + self.visible_rows * cache_row
        )


@contextmanager
def counted_bytes(model: Model, cache_dtype: CacheDtype = "auto") -> Iterator[Callable[[], int]]:
    """A function that tells the bytes which the forward passes of the block had to read."""
    if isinstance(model, PackedTransformer):
        with packed_counters(model) as counters:
            yield lambda: counters["weight_bytes"] + counters["cache_bytes"]
        return
    weights, cache_row = Weights.of(model), cache_row_bytes(model, cache_dtype)
    with recorded(model) as traffic:
        yield lambda: traffic.bytes(weights, cache_row)


@contextmanager
def packed_counters(model: PackedTransformer) -> Iterator[dict[str, int]]:
    """What packed layers and head count within the block, by the names of `packed.COUNTERS`; filled when it ends."""
    counters: dict[str, int] = {}
    model.counters = torch.zeros(len(packed.COUNTERS), dtype=torch.int64)
    try:
        yield counters
    finally:
        counters |= zip(packed.COUNTERS, model.counters.tolist(), strict=True)
        model.counters = None


def cache_row_bytes(model: Model, cache_dtype: CacheDtype = "auto") -> int:
    """Bytes of one token's latents, in all layers that decoding runs."""
    return model.config.num_hidden_layers * row_bytes(model.config, rows_dtype(model.activation_dtype, cache_dtype))


@contextmanager
def recorded(model: Transformer) -> Iterator[Traffic]:
    """Record every forward pass of the block. A hook costs microseconds: it stores, and `Traffic.bytes` counts."""
    traffic = Traffic()

    def step(_: nn.Module, args: tuple[Any, ...]) -> None:
        batch: ForwardBatch = args[0]
        traffic.steps += 1
        traffic.tokens += len(batch.tokens)
        traffic.visible_rows += sum(batch.contexts)

    def head(*_: object) -> None:
        traffic.heads += 1

    def gate(layer: int) -> Any:
        return lambda module, args, output: traffic.chosen.append((layer, output[1].clone()))

    hooks = [model.model.register_forward_pre_hook(step), model.lm_head.register_forward_pre_hook(head)]
    hooks += [moe.gate.register_forward_hook(gate(layer)) for layer, moe in enumerate(moe_layers(model))]
    try:
        yield traffic
    finally:
        for hook in hooks:
            hook.remove()


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
