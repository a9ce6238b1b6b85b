"""How one request is sampled, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass

from kvern.engine.grammar import Grammar


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request; the defaults are greedy.

    max_tokens, min_tokens: bounds of the answer's length; stop ids are masked below min_tokens.
    temperature 0 is greedy; top_p, top_k (0: off) and min_p cut the distribution after the temperature.
    presence_penalty and frequency_penalty count generated tokens, repetition_penalty also the prompt's (1: off).
    logit_bias: (id, what is added to its logit). seed: with it, a draw depends on seed and position only.
    logprobs: None for none, else the chosen token's and those of the k best. prompt_logprobs: the prompt's as well.
    stop_token_ids end the answer, as the model's own stop ids do unless ignore_eos. vocab_limit: ids at and above it,
    the padding of the head, are never drawn. grammar: what the answer must match; it ends where nothing may follow.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    vocab_limit: int | None = None
    grammar: Grammar | None = None
