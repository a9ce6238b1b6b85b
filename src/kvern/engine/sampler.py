"""From logits to a token id: greedy, or one draw from what temperature, min_p, top_k and top_p leave.

    x = logits below vocab_limit; stop ids -inf below min_tokens; + logit_bias
    x = x / r where x > 0 else x * r          for ids in prompt or answer, r = repetition_penalty
    x = x - frequency * count - presence      for ids in the answer
    p = softmax(x / temperature), cut to p >= min_p * max p, then to the top_k largest, then to the smallest set whose
    share of what was left reaches top_p; the token is where the cumulative sum of p, in order of id, passes u

which is vLLM's order. u in [0, 1) is a hash of seed and position, so a token never depends on the rest of the batch or
on what ran before. Where values tie, the lower id wins: exactly top_k ids stay. Log-probabilities are those of the
logits as the model gave them (below vocab_limit), before all of the above: vLLM's default, `raw_logprobs`.

Everything is computed in float64, one row at a time: one row of 152k logits costs 15 microseconds greedy and a few
hundred sampled, and the vocabulary is sorted only where the distribution is nearly flat. It gives up GPUs: logits are
copied to the CPU, and numpy does the work (its argmax over a row takes a tenth of torch's time).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvern.engine.params import SamplingParams
from kvern.engine.request import TokenLogprob
from kvern.errors import BadRequestError, KvernError, NonFiniteLogitsError

Floats = NDArray[np.floating]
Ids = NDArray[np.int64]

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, as in vLLM."""

CUTS = (2.0, 4.0, 6.0, 8.0, 10.0, 13.0, 20.0, math.inf)
"""Distances from the largest score within which candidates are looked for; the next one where the last has too few."""

SPAN = 512
"""Probabilities that are summed before the cumulative sum, which then runs within one span only."""

MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Row:
    """What the sampler needs of one request. tokens: the prompt, then the answer so far; stops: all ids that end it."""

    params: SamplingParams
    seed: int
    tokens: Sequence[int]
    prompt_length: int
    stops: Collection[int] = ()


@dataclass(frozen=True)
class Sampled:
    """The token of a row, or -1 and why there is none."""

    token: int
    logprob: TokenLogprob | None = None
    error: KvernError | None = None


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
    """One token for each row of logits [S, vocab_size] float32. A row that cannot be sampled carries its error."""
    array = logits.detach().cpu().numpy()
    assert len(array) == len(rows), "one row of logits for each request"
    return [_sample(scores[: row.params.vocab_limit], row) for scores, row in zip(array, rows, strict=True)]


def logprobs_of(logits: Tensor, tokens: Sequence[int], params: SamplingParams) -> list[TokenLogprob]:
    """Log-probabilities of tokens [L] under logits [L, vocab_size] float32, with the `params.logprobs` best each.

    An id outside vocab_limit has -inf. Raises NonFiniteLogitsError.
    """
    array = logits.detach().cpu().numpy()
    return [_logprob(scores[: params.vocab_limit], token, params) for scores, token in zip(array, tokens, strict=True)]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits that depends on its arguments only: SplitMix64, twice."""
    return (_mix(_mix(seed) + position) >> 11) / (1 << 53)


def _mix(state: int) -> int:
    """One output of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def _sample(scores: Floats, row: Row) -> Sampled:
    params = row.params
    token = int(scores.argmax())  # numpy counts NaN as the largest
    if not math.isfinite(scores[token]):
        return Sampled(-1, error=NonFiniteLogitsError(f"the logits at position {len(row.tokens)} are not finite"))
    x = scores
    if _edits(row):
        x = _edited(scores, row)
        token = int(x.argmax())
        if not math.isfinite(x[token]):
            return Sampled(-1, error=BadRequestError("min_tokens and logit_bias leave no token to choose from"))
    if params.temperature >= GREEDY_BELOW:
        token = _draw(x, float(x[token]), params, uniform(row.seed, len(row.tokens)))
    return Sampled(token, None if params.logprobs is None else _logprob(scores, token, params))


def _edits(row: Row) -> bool:
    """Whether anything changes the logits before the temperature."""
    params = row.params
    penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    return bool(penalties or params.logit_bias or len(row.tokens) - row.prompt_length < params.min_tokens)


def _edited(scores: Floats, row: Row) -> Floats:
    """A float64 copy with masks, bias and penalties applied."""
    params, x, limit = row.params, scores.astype(np.float64), len(scores)
    answer = row.tokens[row.prompt_length :]
    if len(answer) < params.min_tokens:
        x[[stop for stop in row.stops if stop < limit]] = -math.inf
    for token, bias in params.logit_bias:
        if token < limit:
            x[token] += bias
    if params.repetition_penalty != 1.0:
        seen = np.array([token for token in set(row.tokens) if token < limit], dtype=np.int64)
        x[seen] = np.where(x[seen] > 0, x[seen] / params.repetition_penalty, x[seen] * params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        for token, count in Counter(token for token in answer if token < limit).items():
            x[token] -= params.frequency_penalty * count + params.presence_penalty
    return x


def _draw(scores: Floats, largest: float, params: SamplingParams, u: float) -> int:
    """Temperature, min_p, top_k, top_p, then the inverse of the cumulative distribution at u."""
    x = (scores.astype(np.float64) - largest) / params.temperature
    ids = None
    if params.min_p > 0:
        ids = np.flatnonzero(x >= math.log(params.min_p))
        x = x[ids]
    if 0 < params.top_k < len(x):
        kept = _largest(x, params.top_k, 0.0)
        ids, x = kept if ids is None else ids[kept], x[kept]
    weights = np.exp(x)
    if params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    index = _inverse(weights, u)
    return index if ids is None else int(ids[index])


def _largest(x: Floats, count: int, largest: float) -> Ids:
    """The `count` positions with the largest values, the lower one where they tie; ascending."""
    if count == 0 or count >= len(x):
        return np.arange(min(count, len(x)))
    near = next(near for cut in CUTS if len(near := np.flatnonzero(x >= largest - cut)) >= count)
    values = x[near]
    return near[_down_to(values, np.partition(values, -count)[-count], count)]


def _nucleus(weights: Floats, share: float) -> Ids:
    """Positions of the fewest largest weights (1 is the largest) that reach `share` of the sum; ascending."""
    needed = share * weights.sum()
    near = next(near for cut in CUTS if weights[near := np.flatnonzero(weights >= math.exp(-cut))].sum() >= needed)
    values = weights[near]
    falling = np.sort(values)[::-1]
    last = min(int(np.searchsorted(falling.cumsum(), needed)), len(falling) - 1)
    return near[_down_to(values, falling[last], last + 1)]


def _down_to(values: Floats, least: float, count: int) -> Ids:
    """The `count` positions of values above `least`, then of those equal to it from the left; ascending."""
    kept = values > least
    kept[np.flatnonzero(values == least)[: count - kept.sum()]] = True
    return np.flatnonzero(kept)


def _inverse(weights: Floats, u: float) -> int:
    """The first position at which the cumulative sum passes u times the whole."""
    sums = np.add.reduceat(weights, np.arange(0, len(weights), SPAN)).cumsum()
    target = min(u * sums[-1], math.nextafter(sums[-1], 0.0))
    span = int(np.searchsorted(sums, target, side="right"))
    within = weights[span * SPAN : (span + 1) * SPAN]
    rest = target - (sums[span - 1] if span else 0.0)
    index = int(np.searchsorted(within.cumsum(), rest, side="right"))
    return span * SPAN + min(index, int(np.flatnonzero(within)[-1]))  # rounding may put `rest` behind the last


def _logprob(scores: Floats, token: int, params: SamplingParams) -> TokenLogprob:
    x = scores.astype(np.float64)
    largest = float(x.max())
    if not math.isfinite(largest):
        raise NonFiniteLogitsError("the logits are not finite")
    x -= largest + math.log(np.exp(x - largest).sum())
    best = _largest(scores, params.logprobs or 0, largest)
    best = best[np.argsort(-scores[best], kind="stable")]
    top = tuple(zip(best.tolist(), x[best].tolist(), strict=True))
    return TokenLogprob(token, float(x[token]) if token < len(x) else -math.inf, top)
