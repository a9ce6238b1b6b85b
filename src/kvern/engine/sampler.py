"""From logits to a token id: greedy, or temperature and nucleus (top-p) sampling.

    p = softmax(logits / temperature), kept to the smallest set of ids whose probabilities sum to at least top_p

A draw depends on the seed and on the position only, so the same request gives the same text whatever ran before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. temperature 0 is greedy. `vocab_limit` masks ids at and above it (padded heads)."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    vocab_limit: int | None = None


def sample(logits_V: Tensor, params: SamplingParams, seed: int, position: int) -> int:
    """One id from logits [vocab_size] float32; `seed` is the request's, drawn by the caller where it gave none."""
    if params.vocab_limit is not None:
        logits_V = logits_V[: params.vocab_limit]
    if params.temperature == 0:
        return int(logits_V.argmax())
    probabilities, ids = (logits_V / params.temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities * (before < params.top_p)
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + position) & 0x7FFFFFFFFFFFFFFF)
    return int(ids[torch.multinomial(kept, 1, generator=generator)])
