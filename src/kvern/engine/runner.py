"""Turns the chunks of a step into one forward pass, and its logits into rows for the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvern.engine.cache import PagedCache, Span
from kvern.engine.scheduler import Chunk
from kvern.engine.settings import EngineSettings
from kvern.engine.threads import threads_for
from kvern.errors import ConfigError
from kvern.model import ForwardBatch, Model, PackedTransformer, Transformer
from kvern.model.attention import Attention
from kvern.ops import native


@dataclass(frozen=True)
class Computed:
    """Logits [L, vocab_size] float32; for each chunk, the rows of its tokens that have logits (maybe none).

    hidden: [T, hidden] of all tokens where the MTP layer wants them; starts: where each chunk's tokens begin in them.
    """

    logits: Tensor
    rows: tuple[range, ...]
    hidden: Tensor | None = None
    starts: tuple[int, ...] = ()


class Runner:
    """Owns the model's side of a step. mtp: keep the hidden states of a step for the MTP layer."""

    def __init__(self, model: Model, cache: PagedCache, *, mtp: bool = False) -> None:
        self.model, self.cache, self.mtp = model, cache, mtp
        self._kernel_rows = _kernel_rows(model)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Computed:
        """Compute the chunks: their latents go to the cache, logits come back for the tokens that need them."""
        tokens: list[int] = []
        wanted: list[int] = []
        rows = []
        for chunk in chunks:
            request, first = chunk.request, len(tokens)
            tokens += request.tokens[request.computed : request.computed + chunk.count]
            tokens += chunk.drafts
            before = len(wanted)
            wanted += range(len(tokens) - _logits(chunk), len(tokens))
            rows.append(range(before, len(wanted)))
            assert len(tokens) - first == chunk.count + len(chunk.drafts)
        spans = [Span(c.request.blocks, c.request.computed, c.count + len(c.drafts)) for c in chunks]
        batch = self._batch(spans, tokens, wanted)
        with threads_for(len(tokens), self._kernel_rows):
            if not self.mtp:
                return Computed(self.model(batch), tuple(rows))
            hidden, logits = self.model.with_hidden(batch)
        return Computed(logits, tuple(rows), hidden, batch.query_starts)

    @torch.inference_mode()
    def predict(
        self, hidden_TE: Tensor, spans: Sequence[Span], tokens: Sequence[int], wanted: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The MTP layer over hidden states and the tokens after them; its latents go to the rows of `spans`.

        Returns (states [T, hidden], logits [len(wanted), vocab_size] float32 of the tokens after those).
        """
        batch = self._batch(spans, tokens, wanted)
        with threads_for(len(tokens), self._kernel_rows):
            return self.model.mtp(hidden_TE, batch)

    def _batch(self, spans: Sequence[Span], tokens: Sequence[int], wanted: Sequence[int]) -> ForwardBatch:
        view = self.cache.step(spans)
        return ForwardBatch(
            tokens=torch.tensor(tokens),
            positions=None,
            query_starts=view.query_starts,
            cache=view,
            logits_at=torch.tensor(wanted, dtype=torch.int64),
        )


def wants_mtp(model: Model, settings: EngineSettings) -> bool:
    """Whether the MTP layer is to draft. Raises ConfigError where it should and the model was loaded without one."""
    there = model.has_mtp
    if settings.drafts == "mtp" and not there:
        raise ConfigError("the model has no MTP layer to draft with", hint="use --drafts ngram, or auto")
    return there and settings.drafts in ("auto", "mtp")


def _logits(chunk: Chunk) -> int:
    """How many of the chunk's last tokens need logits: the last of a request and its drafts, or all where asked for."""
    request = chunk.request
    if request.params.prompt_logprobs and request.computed < request.prompt_length:
        return chunk.count
    return int(chunk.count == request.pending) + len(chunk.drafts)


def _kernel_rows(model: Model) -> int:
    """Rows of a step up to which the kernels compute while torch waits; a packed model leaves torch nothing to do."""
    if isinstance(model, PackedTransformer):
        return 0
    return native.kernel_rows(model.activation_dtype, model.lm_head.dtype)


def hold_absorbed_weights(model: Model) -> None:
    """Keep kv_b_proj in the activations' dtype where it is not FP8: decoding multiplies by it head by head."""
    if not isinstance(model, Transformer):
        return
    for module in model.modules():
        if isinstance(module, Attention) and module.kv_b_proj.weight_scale_inv is None:
            dense = module.kv_b_proj.dense(model.activation_dtype)
            module.kv_b_proj.hold(dense)
