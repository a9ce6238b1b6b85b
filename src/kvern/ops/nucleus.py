"""Which ids top_p keeps: the fewest with the largest scores whose weights, e^(score / temperature), reach a share.

    kept = the first k ids in falling order, k the least with  w_1 + .. + w_k >= share * (w_1 + .. + w_n)

as if everything were sorted and summed up in float64. Weights of candidates near the largest are computed in float64;
what all others weigh is only bounded, and where the answer is the same for both bounds, that is it. Otherwise, and
where the candidates are many, all weights are computed, and only the ids of one bin of scores are sorted: for 152k
nearly equal ids that takes 0.9 ms, sorting them 10.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]

NEAR, FAR = 10.0, 20.0
"""Distances, in temperatures, of candidates for top_p: e^-20 for each id beyond FAR is almost nothing, e^-10 is not."""

CANDIDATES = 8
"""At most one id in so many may be a candidate; where more are, every probability is computed in float64."""

FLOAT32_ERROR = 1e-5
"""Bound of the relative error of a sum of float32 exponentials; arguments down to -25 are off by 3e-6 at most."""

BINS = 2048
REACH = 40.0
"""Scores are sorted into so many bins, over this many temperatures below the largest at most."""

LOG2_E = math.log2(math.e)
TINY = 1e-30
"""Scores that differ by less count as equal when they are sorted into bins."""

SLICE = 1 << 14
"""Scores that are sorted into bins at once, so that what is computed on the way stays in the cache."""

SPAN = 512
"""Probabilities that are summed before the cumulative sum, which then runs within one span only."""


def nucleus(scores: Floats, largest: float, temperature: float, share: float) -> tuple[Ids | None, Floats]:
    """The fewest largest scores whose weights reach `share` of the sum of all weights: positions, ascending; weights.

    Positions None: the weights are those of all scores, 0 where they are cut off.
    """
    for distance in (FAR, NEAR):
        close = scores >= _least(scores, largest, distance * temperature)
        if np.count_nonzero(close) * CANDIDATES <= len(scores):
            near = np.flatnonzero(close)
            values = scores[near]
            weights = weights_of(values, largest, temperature)
            least, most = _others(scores, near, largest, temperature, distance)
            kept = _fewest(values, weights, share * (weights.sum() + least), REACH * temperature)
            if weights[kept].sum() >= share * (weights.sum() + most):
                return near[kept], weights[kept]
            break
    weights = weights_of(scores, largest, temperature)
    weights *= _fewest(scores, weights, share * weights.sum(), REACH * temperature)
    return None, weights


def _others(scores: Floats, near: Ids, largest: float, temperature: float, distance: float) -> tuple[float, float]:
    """Bounds of what the scores weigh that are not `near`, which are all further than `distance` temperatures."""
    if distance >= FAR:
        return 0.0, (len(scores) - len(near)) * math.exp(-distance)
    x = (scores - largest).astype(np.float32, copy=False)
    x *= np.float32(LOG2_E / temperature)
    np.exp2(x, out=x)  # in half of the time of exp
    x[near] = 0.0
    weight = float(x.sum())
    return weight * (1 - FLOAT32_ERROR), weight * (1 + FLOAT32_ERROR)


def _fewest(scores: Floats, weights: Floats, needed: float, reach: float) -> Mask:
    """The fewest largest scores whose weights, which rise with them, sum up to `needed`.

    The scores are sorted into bins, those of the bin in which the sum is reached into bins again, and the last of them
    one by one.
    """
    x, w, above, count = scores, weights, 0.0, 0
    while len(x) > BINS and (width := min(float(x.max()) - float(x.min()), reach)) > TINY:
        bins, sums = _binned(x, w, width)
        sums += above
        chosen = min(int(np.searchsorted(sums, needed)), int(bins.max()))
        above = float(sums[chosen - 1]) if chosen else above
        count += int(np.count_nonzero(bins < chosen))
        inside = np.flatnonzero(bins == chosen)
        x, w = x[inside], w[inside]
    last = position(np.sort(w)[::-1], needed - above, side="left")
    return down_to(scores, np.sort(x)[len(x) - 1 - last], count + last + 1)


def _binned(scores: Floats, weights: Floats, width: float) -> tuple[NDArray[np.int16], Floats]:
    """The bin of each score, 0 for the largest, BINS for all from `width` below it on; what the bins weigh, summed."""
    bins, sums, largest = np.empty(len(scores), np.int16), np.zeros(BINS + 1), scores.max()
    for start in range(0, len(scores), SLICE):
        part = slice(start, start + SLICE)
        bins[part] = (np.minimum(largest - scores[part], width) * (BINS / width)).astype(np.int32)
        sums += np.bincount(bins[part], weights[part], BINS + 1)
    return bins, sums.cumsum()


def scaled(scores: Floats, largest: float, temperature: float) -> Floats:
    """(score - largest) / temperature, float64: 0 for the largest."""
    x = scores.astype(np.float64)
    x -= largest
    x *= 1 / temperature
    return x


def weights_of(scores: Floats, largest: float, temperature: float) -> Floats:
    """exp((score - largest) / temperature), float64: 1 for the largest."""
    x = scaled(scores, largest, temperature)
    return np.exp(x, out=x)


def within(scores: Floats, largest: float, distance: float) -> Ids:
    """Positions of all scores down to `largest - distance`, and maybe a few lower ones; ascending."""
    return np.flatnonzero(scores >= _least(scores, largest, distance))


def _least(scores: Floats, largest: float, distance: float) -> Any:
    """The next number of their dtype below `largest - distance`."""
    number = scores.dtype.type
    return np.nextafter(number(largest - distance), number(-math.inf))


def down_to(values: Floats, least: float, count: int) -> Mask:
    """The `count` largest values: those above `least`, and of those equal to it the first."""
    kept = values > least
    kept[np.flatnonzero(values == least)[: count - np.count_nonzero(kept)]] = True
    return kept


def position(weights: Floats, target: float, side: Literal["left", "right"] = "right") -> int:
    """The first position at which the cumulative sum passes `target` (left: reaches it), or the last that weighs.

    Sums of spans come first, then the cumulative sum within one span only.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), SPAN)).cumsum()
    span = min(int(np.searchsorted(sums, target, side)), int(np.searchsorted(sums, sums[-1])))
    inside = weights[span * SPAN : (span + 1) * SPAN]
    rest = target - (sums[span - 1] if span else 0.0)
    index = int(np.searchsorted(inside.cumsum(), rest, side))
    weighing = np.flatnonzero(inside)  # rounding may put `rest` behind the last, and the target behind all that weigh
    return span * SPAN + min(index, int(weighing[-1]) if len(weighing) else 0)
