"""From logits to a token id: greedy, or one draw from what temperature, min_p, top_k and top_p leave.

    x = logits below vocab_limit; -inf where the grammar forbids; stop ids -inf below min_tokens; + logit_bias
    x = x / r where x > 0 else x * r          for ids in prompt or answer, r = repetition_penalty
    x = x - frequency * count - presence      for ids in the answer
    then temperature, min_p, top_k, top_p and the draw: `ops.draw`

which is vLLM's order. u in [0, 1) is a hash of seed and position, so a token never depends on the rest of the batch or
on what ran before. Log-probabilities are those of the logits as the model gave them (below vocab_limit), before all of
the above: vLLM's default, `raw_logprobs`.

Here only the few scores that a request changes are computed, in float64; all passes over the vocabulary are those of
`ops.draw` and `ops.logprobs`. A greedy row whose best token its
grammar allows needs no mask. It gives up GPUs: logits are copied to the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, from_numpy

from kvern import ops
from kvern.engine.grammar import Matcher, allowed, allows
from kvern.engine.params import SamplingParams
from kvern.engine.request import TokenLogprob
from kvern.errors import BadRequestError, KvernError, NonFiniteLogitsError
from kvern.ops.nucleus import Floats, Ids
from kvern.ops.reference_sampling import NOT_FINITE, NOTHING_LEFT, Draw, Logprobs, Scored

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, as in vLLM."""

MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Row:
    """What the sampler needs of one request. tokens: the prompt, then the answer so far; stops: all ids that end it.

    matcher: what its grammar allows next.
    """

    params: SamplingParams
    seed: int
    tokens: Sequence[int]
    prompt_length: int
    stops: Collection[int] = ()
    matcher: Matcher | None = None


@dataclass(frozen=True)
class Sampled:
    """The token of a row, or -1 and why there is none."""

    token: int
    logprob: TokenLogprob | None = None
    error: KvernError | None = None


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """One token for each row of logits [S, vocab_size] float32. A row that cannot be sampled carries its error."""
    logits = logits.detach().cpu()
    assert len(logits) == len(rows), "one row of logits for each request"
    tokens = ops.draw(logits, [_first_draw(logits, i, row) for i, row in enumerate(rows)])
    errors: dict[int, KvernError] = {}
    for i, row in enumerate(rows):
        if row.matcher is not None and tokens[i] != NOT_FINITE:
            try:
                tokens[i] = _held_to(row.matcher, logits, i, row, tokens[i])
            except KvernError as error:
                tokens[i], errors[i] = -1, error
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None and tokens[i] >= 0]
    told: dict[int, TokenLogprob] = {}
    if asked:
        chosen = logits if len(asked) == len(rows) else logits[asked]
        found = ops.logprobs(chosen, [_wanted(chosen, tokens[i], rows[i].params) for i in asked])
        told = {i: _told(tokens[i], one) for i, one in zip(asked, found, strict=True)}
    return [
        Sampled(-1, error=errors[i]) if i in errors else _sampled(token, row, told.get(i))
        for i, (token, row) in enumerate(zip(tokens, rows, strict=True))
    ]


def _first_draw(logits: Tensor, index: int, row: Row) -> Draw:
    """The draw without a grammar; where that can not be the answer, only whether the logits are finite."""
    drawn_again = row.matcher is not None and row.params.temperature >= GREEDY_BELOW
    return Draw(_limit(logits, row.params)) if drawn_again else _draw(logits, index, row)


def _held_to(matcher: Matcher, logits: Tensor, index: int, row: Row, token: int) -> int:
    """The token of a row under its grammar; `token` is the one without. Raises KvernError as the matcher does."""
    if row.params.temperature < GREEDY_BELOW and token >= 0 and allows(matcher, token, row.stops):
        return token
    limit = _limit(logits, row.params)
    may = allowed(matcher, row.stops, limit)
    if not may.any():
        return NOTHING_LEFT
    masked = np.where(may, logits[index, :limit].numpy(), np.float32(-math.inf))
    one = _draw(logits, index, row)
    if one.edited is not None and one.scores is not None:
        kept = may[one.edited]
        one = replace(one, edited=one.edited[kept], scores=one.scores[kept])
    (token,) = ops.draw(from_numpy(masked[None]), [one])
    return token if token < 0 or may[token] else NOTHING_LEFT


def logprobs_of(logits: Tensor, tokens: Sequence[int], params: SamplingParams) -> list[TokenLogprob]:
    """Log-probabilities of tokens [L] under logits [L, vocab_size] float32, with the `params.logprobs` best each.

    An id outside vocab_limit has -inf. Raises NonFiniteLogitsError.
    """
    logits = logits.detach().cpu()
    found = ops.logprobs(logits, [_wanted(logits, token, params) for token in tokens])
    return [_told(token, one) for token, one in zip(tokens, found, strict=True)]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits that depends on its arguments only: SplitMix64, twice."""
    return (_mix(_mix(seed) + position) >> 11) / (1 << 53)


def _mix(state: int) -> int:
    """One output of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def _sampled(token: int, row: Row, logprob: TokenLogprob | None) -> Sampled:
    if token == NOT_FINITE:
        return Sampled(-1, error=NonFiniteLogitsError(f"the logits at position {len(row.tokens)} are not finite"))
    if token == NOTHING_LEFT:
        return Sampled(-1, error=BadRequestError(f"{_nothing_but(row)} leave no token to choose from"))
    return Sampled(token, logprob)


def _nothing_but(row: Row) -> str:
    return "min_tokens and logit_bias" if row.matcher is None else "the grammar, stop ids and min_tokens"


def _limit(logits: Tensor, params: SamplingParams) -> int:
    return logits.shape[-1] if params.vocab_limit is None else min(params.vocab_limit, logits.shape[-1])


def _draw(logits: Tensor, index: int, row: Row) -> Draw:
    """What to draw from logits[index]."""
    params, limit = row.params, _limit(logits, row.params)
    edited, scores = _edited(logits[index, :limit].numpy(), row) if _edits(row) else (None, None)
    if params.temperature < GREEDY_BELOW:
        return Draw(limit, edited=edited, scores=scores)
    u = uniform(row.seed, len(row.tokens))
    return Draw(limit, params.temperature, params.top_p, params.top_k, params.min_p, u, edited, scores)


def _edits(row: Row) -> bool:
    """Whether anything changes the logits before the temperature."""
    params = row.params
    penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    return bool(penalties or params.logit_bias or len(row.tokens) - row.prompt_length < params.min_tokens)


def _edited(logits: Floats, row: Row) -> tuple[Ids, Floats]:
    """Ids below len(logits) that masks, bias and penalties change, ascending, and their scores in float64."""
    params, limit = row.params, len(logits)
    tokens = np.array(row.tokens, dtype=np.int64)
    answer, counts = np.unique(tokens[row.prompt_length :], return_counts=True)
    stops = np.array(list(row.stops) if len(row.tokens) - row.prompt_length < params.min_tokens else (), dtype=np.int64)
    bias = np.array([token for token, _ in params.logit_bias], dtype=np.int64)
    seen = np.unique(tokens) if params.repetition_penalty != 1.0 else answer
    ids = np.unique(np.concatenate([stops, bias, seen, answer]))
    x = logits[ids[ids < limit]].astype(np.float64)
    x = np.concatenate([x, np.zeros(len(ids) - len(x))])  # ids at and above the limit are dropped in the end
    x[np.searchsorted(ids, stops)] = -math.inf
    np.add.at(x, np.searchsorted(ids, bias), [added for _, added in params.logit_bias])
    if params.repetition_penalty != 1.0:
        at = np.searchsorted(ids, seen)
        x[at] = np.where(x[at] > 0, x[at] / params.repetition_penalty, x[at] * params.repetition_penalty)
    x[np.searchsorted(ids, answer)] -= params.frequency_penalty * counts + params.presence_penalty
    return ids[ids < limit], x[: np.count_nonzero(ids < limit)]


def _wanted(logits: Tensor, token: int, params: SamplingParams) -> Scored:
    return Scored(_limit(logits, params), token, params.logprobs or 0)


def _told(token: int, found: Logprobs | None) -> TokenLogprob:
    if found is None:
        raise NonFiniteLogitsError("the logits are not finite")
    return TokenLogprob(token, found[0], tuple(found[1]))
