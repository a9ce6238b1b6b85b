"""ForwardBatch: everything that a forward pass needs besides weights, passed as one argument.

Tokens of several sequences lie one after the other, without padding. The same batch serves training (no cache, whole
documents), prefill, chunked prefill and decoding (a cache, the tokens still to compute); the model knows no phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor

from kvern import ops


class MLAForm(Enum):
    """How attention reads the latent: EXPANDED rebuilds per-head keys and values, ABSORBED stays in latent space."""

    EXPANDED = "expanded"
    ABSORBED = "absorbed"


class LatentCache(Protocol):
    """Where the latents of a batch and of earlier tokens live: D = latent_dim numbers a token and layer."""

    def extend(self, layer: int, latent_TD: Tensor) -> None:
        """Store the latents of all tokens of the batch in `layer`."""

    def context(self, layer: int, sequence: int, span: slice) -> Tensor:
        """[C, D]: all latents of the `sequence`-th sequence, those of the batch (its tokens `span`) last."""

    def attend(
        self, layer: int, q_THD: Tensor, sequences: Sequence[int], batch: ForwardBatch, rank: int, scale: float
    ) -> Tensor:
        """Absorbed attention [T, H, rank] of the queries of `sequences`, which lie in q one after the other."""


class PagedLatents(Protocol):
    """A cache whose latents lie in blocks: its books for the S sequences and T tokens of a batch.

    rows [layers, N, D], or the records of `ops.encode_latents`, uint8 [layers, N, latent8_bytes]: token r of sequence s
    lies in rows[layer, tables[s, r // block_size] * block_size + r % block_size]. tables [S, blocks] int32; contexts
    [S] int32, this batch's tokens included; starts [S + 1] int32, offsets into the tokens.
    """

    tables: Tensor
    contexts: Tensor
    starts: Tensor

    @property
    def positions(self) -> Tensor:
        """[T] int64, the place of each token in its sequence."""

    @property
    def rows(self) -> Tensor:
        """All layers' rows."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""


class BatchLatents:
    """The cache of a batch that has none: the latents of its own tokens, kept for as long as a layer computes."""

    def __init__(self) -> None:
        self._latent_TD = torch.empty(0)

    def extend(self, layer: int, latent_TD: Tensor) -> None:
        """Keep the latents of the layer that computes now."""
        self._latent_TD = latent_TD

    def context(self, layer: int, sequence: int, span: slice) -> Tensor:
        """The sequence's own tokens."""
        return self._latent_TD[span]

    def attend(
        self, layer: int, q_THD: Tensor, sequences: Sequence[int], batch: ForwardBatch, rank: int, scale: float
    ) -> Tensor:
        """Sequence by sequence."""
        parts, first = [], 0
        for sequence in sequences:
            latent_CD = self._latent_TD[batch.span(sequence)]
            q = q_THD[first : first + len(latent_CD)]
            parts.append(ops.latent_attention(q, latent_CD, rank, scale))
            first += len(latent_CD)
        return torch.cat(parts)


@dataclass(frozen=True)
class ForwardBatch:
    """T tokens of S sequences.

    tokens: [T] int64. positions: [T] int64, consecutive within each sequence; None: a paged cache tells, and without a
    cache every sequence begins at 0. query_starts: S + 1 offsets into tokens.
    logits_at: [L] int64, the tokens whose logits are wanted; None: all. form: which MLA form; None: the cheaper one.
    """

    tokens: Tensor
    positions: Tensor | None
    query_starts: tuple[int, ...]
    cache: LatentCache | None = None
    logits_at: Tensor | None = None
    form: MLAForm | None = None

    @classmethod
    def of(cls, *sequences: list[int], form: MLAForm | None = None) -> ForwardBatch:
        """A batch of whole token lists, each from position 0, without a cache, with logits for every token."""
        starts = [0]
        for sequence in sequences:
            starts.append(starts[-1] + len(sequence))
        tokens = torch.tensor([token for sequence in sequences for token in sequence])
        positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
        return cls(tokens, positions, tuple(starts), form=form)

    def span(self, sequence: int) -> slice:
        """Where the tokens of the `sequence`-th sequence lie."""
        return slice(self.query_starts[sequence], self.query_starts[sequence + 1])

    @cached_property
    def places(self) -> Tensor:
        """[T] int64: `positions`, wherever they come from."""
        if self.positions is not None:
            return self.positions
        if self.cache is not None:
            return cast(PagedLatents, self.cache).positions
        return torch.cat([torch.arange(last - first) for first, last in pairwise(self.query_starts)])

    @cached_property
    def contexts(self) -> tuple[int, ...]:
        """Context rows of each sequence, its tokens of this batch included."""
        if self.cache is None:
            return tuple(last - first for first, last in pairwise(self.query_starts))
        ends: list[int] = self.places[torch.tensor(self.query_starts[1:]) - 1].tolist()
        return tuple(end + 1 for end in ends)

    @cached_property
    def longest(self) -> int:
        """Most tokens that one sequence has in this batch."""
        return max(last - first for first, last in pairwise(self.query_starts))
