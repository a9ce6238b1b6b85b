"""Turns the chunks of a step into one forward pass, and its logits into rows for the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvern.engine.cache import PagedCache, Span
from kvern.engine.scheduler import Chunk
from kvern.engine.threads import threads_for
from kvern.model import ForwardBatch, Transformer
from kvern.model.attention import Attention
from kvern.ops import native


@dataclass(frozen=True)
class Computed:
    """Logits [L, vocab_size] float32; for each chunk, the rows of its tokens that have logits (maybe none)."""

    logits: Tensor
    rows: tuple[range, ...]


class Runner:
    """Owns the model's side of a step."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self._kernel_rows = native.kernel_rows(model.activation_dtype, model.lm_head.dtype)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Computed:
        """Compute the chunks: their latents go to the cache, logits come back for the tokens that need them."""
        tokens: list[int] = []
        wanted: list[int] = []
        rows = []
        for chunk in chunks:
            request, first = chunk.request, len(tokens)
            tokens += request.tokens[request.computed : request.computed + chunk.count]
            before = len(wanted)
            wanted += range(len(tokens) - _logits(chunk), len(tokens))
            rows.append(range(before, len(wanted)))
            assert len(tokens) - first == chunk.count
        view = self.cache.step([Span(c.request.blocks, c.request.computed, c.count) for c in chunks])
        batch = ForwardBatch(
            tokens=torch.tensor(tokens),
            positions=view.positions,
            query_starts=tuple(view.starts.tolist()),
            cache=view,
            logits_at=torch.tensor(wanted, dtype=torch.int64),
        )
        with threads_for(len(tokens), self._kernel_rows):
            logits: Tensor = self.model(batch)
        return Computed(logits, tuple(rows))


def _logits(chunk: Chunk) -> int:
    """How many of the chunk's last tokens need logits: the very last of a request, or all where asked for."""
    request = chunk.request
    if request.params.prompt_logprobs and request.computed < request.prompt_length:
        return chunk.count
    return int(chunk.count == request.pending)


def hold_absorbed_weights(model: Transformer) -> None:
    """Keep kv_b_proj in the activations' dtype where it is not FP8: decoding multiplies by it head by head."""
    for module in model.modules():
        if isinstance(module, Attention) and module.kv_b_proj.weight_scale_inv is None:
            dense = module.kv_b_proj.dense(model.activation_dtype)
            module.kv_b_proj.hold(dense)
