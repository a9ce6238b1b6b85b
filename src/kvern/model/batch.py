"""ForwardBatch: everything that a forward pass needs besides weights, passed as one argument.

Tokens of several sequences lie one after the other, without padding. The same batch serves training (no cache, whole
documents), prefill, chunked prefill and decoding (a cache, the tokens still to compute); the model knows no phases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor


class MLAForm(Enum):
    """How attention reads the latent: EXPANDED rebuilds per-head keys and values, ABSORBED stays in latent space."""

    EXPANDED = "expanded"
    ABSORBED = "absorbed"


class LatentCache(Protocol):
    """Where latents of earlier tokens live. D = kv_lora_rank + qk_rope_head_dim numbers a token and layer."""

    def extend(self, layer: int, latent_TD: Tensor, batch: ForwardBatch) -> None:
        """Store the latents of all tokens of the batch in `layer`."""

    def context(self, layer: int, sequence: int, batch: ForwardBatch) -> Tensor:
        """[C, D]: all latents of the batch's `sequence`-th sequence, those just stored last."""


@dataclass(frozen=True)
class ForwardBatch:
    """T tokens of S sequences.

    tokens: [T] int64. positions: [T] int64, consecutive within each sequence. query_starts: S + 1 offsets into tokens.
    logits_at: [L] int64, the tokens whose logits are wanted; None: all. form: which MLA form; None: the cheaper one.
    """

    tokens: Tensor
    positions: Tensor
    query_starts: tuple[int, ...]
    cache: LatentCache | None = None
    logits_at: Tensor | None = None
    form: MLAForm | None = None

    @classmethod
    def of(
        cls, *sequences: list[int], start: int = 0, cache: LatentCache | None = None, form: MLAForm | None = None
    ) -> ForwardBatch:
        """A batch of whole token lists, each beginning at position `start`, with logits for every token."""
        starts = [0]
        for sequence in sequences:
            starts.append(starts[-1] + len(sequence))
        tokens = torch.tensor([token for sequence in sequences for token in sequence])
        positions = torch.cat([torch.arange(start, start + len(sequence)) for sequence in sequences])
        return cls(tokens, positions, tuple(starts), cache, form=form)

    def spans(self) -> Iterator[tuple[int, slice]]:
        """(sequence index, slice of its tokens) for each sequence."""
        for sequence, (first, last) in enumerate(zip(self.query_starts, self.query_starts[1:], strict=False)):
            yield sequence, slice(first, last)
