"""Generation for one request: chunked prefill, then a token a step over the latent cache.

A request is "tokens still to compute": the prompt in chunks of PREFILL_ROWS, then each sampled token. What it gives up
until the batching engine arrives: requests share no step and no prefix.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from kvern.engine.cache import SequenceCache
from kvern.engine.sampler import SamplingParams, sample
from kvern.engine.threads import threads_for
from kvern.errors import BadRequestError
from kvern.model import ForwardBatch, Transformer
from kvern.model.attention import Attention

PREFILL_ROWS = 512
"""Prompt tokens a forward pass; bounds the activations of long prompts and how soon a cancel is seen."""


class Engine:
    """Runs `model` for one request at a time; `max_context` bounds prompt plus answer."""

    def __init__(self, model: Transformer, *, max_context: int | None = None) -> None:
        self.model = model
        limit = model.config.max_position_embeddings
        self.max_context = min(max_context or limit, limit)
        self.vocab_size = model.config.vocab_size
        self.stop_ids = frozenset(model.config.eos_token_id)
        hold_absorbed_weights(model)

    def generate(
        self, prompt: Sequence[int], params: SamplingParams, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[int]:
        """Token ids of the answer, the stop id (when one is drawn) included as the last.

        Ends at a stop id, at `params.max_tokens`, or within one step of `cancelled()`. Raises BadRequestError for an
        empty prompt, an id outside the vocabulary, or a prompt that leaves no room in the context.
        """
        self._check(prompt, params)
        return self._run(list(prompt), params, cancelled)

    def _run(self, prompt: list[int], params: SamplingParams, cancelled: Callable[[], bool]) -> Iterator[int]:
        seed = secrets.randbits(63) if params.seed is None else params.seed
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.stop_ids)
        room = min(params.max_tokens, self.max_context - len(prompt))
        cache = SequenceCache(self.model.config, len(prompt) + room, self.model.activation_dtype)
        done, pending = 0, prompt
        for _ in range(room):
            while len(pending) > PREFILL_ROWS and not cancelled():
                self._step(pending[:PREFILL_ROWS], done, cache)
                done, pending = done + PREFILL_ROWS, pending[PREFILL_ROWS:]
            if cancelled():
                return
            logits_V = self._step(pending, done, cache)
            done += len(pending)
            token = sample(logits_V, params, seed, done)
            yield token
            if token in stops:
                return
            pending = [token]

    @torch.inference_mode()
    def _step(self, tokens: list[int], start: int, cache: SequenceCache) -> Tensor:
        """Compute `tokens` at positions from `start` on; logits [vocab_size] of the last."""
        batch = ForwardBatch(
            tokens=torch.tensor(tokens),
            positions=torch.arange(start, start + len(tokens)),
            query_starts=(0, len(tokens)),
            cache=cache,
            logits_at=torch.tensor([len(tokens) - 1]),
        )
        with threads_for(len(tokens), start + len(tokens)):
            logits: Tensor = self.model(batch)
        return logits[0]

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        if not prompt:
            raise BadRequestError("the prompt is empty")
        if len(prompt) >= self.max_context:
            raise BadRequestError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.max_context}, answer included",
                hint="shorten the prompt or serve with a larger --max-context",
            )
        if params.max_tokens < 1:
            raise BadRequestError(f"max_tokens must be at least 1, not {params.max_tokens}", param="max_tokens")
        outside = [token for token in prompt if not 0 <= token < self.vocab_size]
        if outside:
            raise BadRequestError(f"token id {outside[0]} is outside the vocabulary of {self.vocab_size}")


def hold_absorbed_weights(model: Transformer) -> None:
    """Keep kv_b_proj in the activations' dtype where it is not FP8: decoding multiplies by it head by head."""
    for module in model.modules():
        if isinstance(module, Attention) and module.kv_b_proj.weight_scale_inv is None:
            dense = module.kv_b_proj.dense(model.activation_dtype)
            module.kv_b_proj.weight = nn.Parameter(dense, requires_grad=False)
