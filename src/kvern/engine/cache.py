"""The paged latent cache: kv_lora_rank + qk_rope_head_dim numbers a token and layer, 98 % under plain MHA.

    rows[layer, block * block_size + offset] = the latent of one token, in the activations' dtype
                                             or, in FP8, as a record of bytes (`ops.reference_latent8`), half of BF16

All rows of a cache have one dtype for as long as it lives, so blocks that requests share never mix two.
Memory is reserved for all blocks and touched as they fill. `PagedCache.step` gives a view for one forward pass: where
its tokens go and which blocks each sequence reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from kvern import ops
from kvern.config import ModelConfig
from kvern.engine.settings import CacheDtype
from kvern.model import ForwardBatch
from kvern.plan.memory import latent8_bytes

RECORDS = torch.uint8
"""The dtype of rows that are records of an FP8 cache."""


def rows_dtype(activations: torch.dtype, chosen: CacheDtype) -> torch.dtype:
    """What the rows of a cache are stored in."""
    return RECORDS if chosen == "fp8" else activations


def row_width(config: ModelConfig, dtype: torch.dtype) -> int:
    """Elements of a row: numbers, or bytes of a record."""
    if dtype is RECORDS:
        return latent8_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
    return config.latent_dim


def row_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of a token in one layer."""
    return row_width(config, dtype) * dtype.itemsize


def stored_rows(latent_TD: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """Latents [T, latent_dim] as rows of a cache."""
    return ops.encode_latents(latent_TD, rank) if dtype is RECORDS else latent_TD.to(dtype)


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence in a step: its blocks, tokens already in the cache, tokens of this step."""

    blocks: Sequence[int]
    computed: int
    count: int


class PagedCache:
    """Rows [layers, blocks * block_size, latent_dim] in `dtype`, or records of latent8_bytes where that is RECORDS."""

    def __init__(self, config: ModelConfig, blocks: int, block_size: int, dtype: torch.dtype) -> None:
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.block_size, self.rank, self.rope = block_size, config.kv_lora_rank, config.qk_rope_head_dim
        self.rows = torch.empty(layers, blocks * block_size, row_width(config, dtype), dtype=dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows; RECORDS in FP8."""
        return self.rows.dtype

    def numbers(self, rows: Tensor) -> Tensor:
        """[C, latent_dim] of rows [C, ..]; float32 of records."""
        return ops.decode_latents(rows, self.rank, self.rope) if self.dtype is RECORDS else rows

    def step(self, spans: Sequence[Span]) -> StepCache:
        """The view of one forward pass over `spans`, in the batch's order."""
        contexts = [span.computed + span.count for span in spans]
        used = [-(-context // self.block_size) for context in contexts]
        tables = np.zeros((len(spans), max(used)), dtype=np.int32)
        for row, span in enumerate(spans):
            tables[row, : used[row]] = span.blocks[: used[row]]
        starts = tuple(accumulate((span.count for span in spans), initial=0))
        books = (tables, np.array(contexts, dtype=np.int32), np.array(starts, dtype=np.int32))
        return StepCache(self, starts, *map(torch.from_numpy, books))


@dataclass(frozen=True)
class StepCache:
    """A `LatentCache` for one forward pass.

    query_starts and starts [S + 1] int32: offsets into the tokens; tables [S, blocks] int32; contexts [S] int32, this
    step's tokens included.
    """

    cache: PagedCache
    query_starts: tuple[int, ...]
    tables: Tensor
    contexts: Tensor
    starts: Tensor

    @cached_property
    def positions(self) -> Tensor:
        """[T] int64, the place of each token in its sequence."""
        last = self.contexts - self.starts[1:]
        return torch.arange(self.query_starts[-1]) + last.long()[self._owners]

    @cached_property
    def slots(self) -> Tensor:
        """[T] int64, the row of each token."""
        blocks, size = self.tables[self._owners, self.positions // self.block_size].long(), self.block_size
        return blocks * size + self.positions % size

    @cached_property
    def _owners(self) -> Tensor:
        """[T] int64, the sequence of each token."""
        return torch.repeat_interleave(torch.arange(len(self.contexts)), self.starts.diff())

    @property
    def rows(self) -> Tensor:
        """Those of the whole cache, see PagedCache."""
        return self.cache.rows

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.cache.block_size

    def extend(self, layer: int, latent_TD: Tensor) -> None:
        """Store the latents of all tokens of the step."""
        self.cache.rows[layer].index_copy_(0, self.slots, stored_rows(latent_TD, self.cache.rank, self.cache.dtype))

    def context(self, layer: int, sequence: int, span: slice) -> Tensor:
        """[C, latent_dim] of the `sequence`-th sequence; a view of numbers whose blocks lie one after the other."""
        count, size = int(self.contexts[sequence]), self.cache.block_size
        blocks = self.tables[sequence, : -(-count // size)].long()
        rows = self.cache.rows[layer]
        first = int(blocks[0])
        if torch.equal(blocks, torch.arange(first, first + len(blocks))):
            return self.cache.numbers(rows[first * size : first * size + count])
        return self.cache.numbers(rows.view(-1, size, rows.shape[-1])[blocks].flatten(0, 1)[:count])

    def attend(
        self, layer: int, q_THD: Tensor, sequences: Sequence[int], batch: ForwardBatch, rank: int, scale: float
    ) -> Tensor:
        """Absorbed attention [T, H, rank] of the queries of `sequences`, which lie in q one after the other."""
        tables, contexts, starts = self.tables, self.contexts, self.starts
        if len(sequences) < len(contexts):
            chosen = torch.tensor(sequences)
            tables, contexts = tables[chosen], contexts[chosen]
            starts = torch.cat([starts[:1], (self.starts[1:] - self.starts[:-1])[chosen].cumsum(0).int()])
        rows = self.cache.rows[layer]
        return ops.paged_latent_attention(q_THD, rows, tables, contexts, starts, self.cache.block_size, rank, scale)
