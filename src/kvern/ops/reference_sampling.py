"""Drawing a token from a row of logits, in numpy and float64: the specification, and the fallback.

    x = logits below the limit, with the edited scores in their places
    p = e^((x - max x) / temperature), cut to p >= min_p, then to the top_k largest, then to the smallest set whose
    share of what was left reaches top_p; the token is where the cumulative sum of p, in order of id, passes u times its
    total

Where scores tie, the lower id comes first: exactly top_k ids stay. Temperature 0 is the largest score. A row of 152k
logits costs 15 microseconds greedy, 130 with top_k, 280 with top_p or the temperature alone, 900 to 1,900 with top_p
where all ids are nearly or quite equal, and 300 more with log-probabilities; 16 rows, which no cache holds, cost about
20 times as much. numpy's argmax over a row takes a tenth of torch's time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kvern.ops.nucleus import Floats, Ids, down_to, nucleus, position, scaled, weights_of, within

CUTS = (2.0, 4.0, 6.0, 8.0, 10.0, 13.0, 20.0, math.inf)
"""Distances from the largest score within which the k largest are looked for, each tried where the last has too few."""

NOT_FINITE = -1
"""Instead of a token: one of the logits is a NaN, or the largest is infinite."""
NOTHING_LEFT = -2
"""Instead of a token: the edited scores are all -inf, or one is a NaN or +inf."""


@dataclass(frozen=True)
class Draw:
    """One draw from a row.

    limit: ids at and above it do not exist. temperature: 0, or at least 1e-300; top_p and min_p in [0, 1] (1 and 0:
    off); top_k (0: off); uniform in [0, 1). edited: ids int64 [E], below the limit, whose logits are replaced by scores
    float64 [E], both dense.
    """

    limit: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    uniform: float = 0.0
    edited: Ids | None = None
    scores: Floats | None = None


@dataclass(frozen=True)
class Scored:
    """Which log-probabilities of a row are wanted: those of `token` and of the `best` largest, below `limit`."""

    limit: int
    token: int
    best: int = 0


Logprobs = tuple[float, list[tuple[int, float]]]
"""The log-probability of a token, -inf outside the limit; (id, log-probability) of the best, falling."""


def draw(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """A token for each row of logits [S, vocab_size] float32, or NOT_FINITE or NOTHING_LEFT."""
    array = logits.detach().cpu().numpy()
    return [_draw(scores[: one.limit], one) for scores, one in zip(array, draws, strict=True)]


def logprobs(logits: Tensor, wanted: Sequence[Scored]) -> list[Logprobs | None]:
    """Log-probabilities for each row of logits [S, vocab_size] float32; None for a row that is not finite."""
    array = logits.detach().cpu().numpy()
    return [_logprobs(scores[: one.limit], one) for scores, one in zip(array, wanted, strict=True)]


def _draw(scores: Floats, one: Draw) -> int:
    token = int(scores.argmax())  # numpy counts NaN as the largest
    if not math.isfinite(scores[token]):
        return NOT_FINITE
    if one.edited is not None:
        scores = scores.astype(np.float64)
        scores[one.edited] = one.scores
        token = int(scores.argmax())
        if not math.isfinite(scores[token]):
            return NOTHING_LEFT
    return token if one.temperature == 0 else _random(scores, float(scores[token]), one)


def _random(scores: Floats, largest: float, one: Draw) -> int:
    """Temperature, min_p, top_k, top_p, then the inverse of the cumulative distribution at u."""
    temperature = one.temperature
    ids: Ids | None = None
    if one.min_p > 0:
        near = within(scores, largest, -math.log(one.min_p) * temperature)
        ids = near[scaled(scores[near], largest, temperature) >= math.log(one.min_p)]
        scores = scores[ids]
    if 0 < one.top_k < len(scores):
        kept = _largest(scores, one.top_k, largest)
        ids, scores = kept if ids is None else ids[kept], scores[kept]
    if one.top_p < 1:
        top, shares = nucleus(scores, largest, temperature, one.top_p)
        ids = ids if top is None else top if ids is None else ids[top]
    else:
        shares = weights_of(scores, largest, temperature)
    index = position(shares, one.uniform * shares.sum())
    return index if ids is None else int(ids[index])


def _largest(x: Floats, count: int, largest: float) -> Ids:
    """The `count` positions with the largest values, the lower one where they tie; ascending."""
    if count == 0 or count >= len(x):
        return np.arange(min(count, len(x)))
    near = next(near for cut in CUTS if len(near := np.flatnonzero(x >= largest - cut)) >= count)
    values = x[near]
    return near[down_to(values, np.partition(values, -count)[-count], count)]


def _logprobs(scores: Floats, one: Scored) -> Logprobs | None:
    largest = float(scores.max())
    if not math.isfinite(largest):
        return None
    whole = largest + math.log(weights_of(scores, largest, 1.0).sum())
    best = _largest(scores, one.best, largest)
    best = best[np.argsort(-scores[best], kind="stable")]
    top = list(zip(best.tolist(), (scores[best].astype(np.float64) - whole).tolist(), strict=True))
    return float(scores[one.token]) - whole if 0 <= one.token < len(scores) else -math.inf, top
