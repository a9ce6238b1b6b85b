"""What top_p keeps, against sorting everything: scores in few bins and in many, bounds that decide and that do not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvern.ops import nucleus

CLOSE = 1e-9
"""Distance from a boundary within which rounding may decide."""

SCORE = st.one_of(st.integers(-8, 8).map(lambda x: x / 2), st.floats(-30, 30, width=32), st.just(-math.inf))
SHARE = st.integers(0, 1023).map(lambda x: x / 1024)


@settings(max_examples=300)
@given(st.lists(SCORE, min_size=1, max_size=60), st.sampled_from([2, 3, 8]), st.sampled_from([1, 5, 64]), st.data())
def test_the_fewest_that_reach_a_sum(scores: list[float], bins: int, slice_: int, data: st.DataObject) -> None:
    x = np.array(scores, np.float32)
    assume(x.max() > -math.inf)
    weights = np.exp(x.astype(np.float64) - x.max())
    needed = data.draw(SHARE) * weights.sum()
    order = np.argsort(-x, kind="stable")
    sums = weights[order].cumsum()
    assume(np.abs(sums - needed).min() > CLOSE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nucleus, "BINS", bins)
        patch.setattr(nucleus, "SLICE", slice_)
        kept = nucleus._fewest(x, weights, needed, data.draw(st.sampled_from([0.5, 4.0, 40.0])))
    assert np.flatnonzero(kept).tolist() == sorted(order[: min(int((sums < needed).sum()) + 1, len(x))].tolist())


@settings(max_examples=150)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 1.0, 2.5, 6.0]), SHARE, st.sampled_from([0.3, 0.7, 1.5]))
def test_the_nucleus_is_the_plain_one(seed: int, spread: float, share: float, temperature: float) -> None:
    """Thousands of ids: with few candidates and a bound of the rest, or with all of them computed."""
    x = (np.random.default_rng(seed).standard_t(5, 4000) * spread).astype(np.float32)
    order = np.argsort(-x, kind="stable")
    weights = np.exp((x.astype(np.float64) - x.max()) / temperature)
    sums = weights[order].cumsum()
    assume(np.abs(sums / sums[-1] - share).min() > CLOSE)
    expected = np.sort(order[: int((sums < share * sums[-1]).sum()) + 1])
    ids, got = nucleus.nucleus(x, float(x.max()), temperature, share)
    assert (np.flatnonzero(got) if ids is None else ids).tolist() == expected.tolist()
    assert got[got > 0] == pytest.approx(weights[expected], rel=1e-12)


@pytest.mark.parametrize(("distance", "off"), [(20.01, 4e-6), (14.0, 1e-6)])
def test_a_nucleus_that_depends_on_what_the_many_weigh(distance: float, off: float) -> None:
    """`share` is reached by the first or only with the second, by less than the bounds of the rest tell apart."""
    x = np.array([0.0, -1.0] + [-distance] * 4000, np.float32)
    weights = np.exp(x.astype(np.float64))
    for share, count in ((1 / (weights.sum() - off), 2), (1 / (weights.sum() + off), 1)):
        _, got = nucleus.nucleus(x, 0.0, 1.0, share)
        assert np.count_nonzero(got) == count


def test_a_share_that_rounding_puts_behind_all_that_weighs() -> None:
    """`share` of the sum is reached, rounded, only where weights are zeros already."""
    x = np.concatenate([np.zeros(7), np.full(5000, -2000.0) - np.arange(5000)]).astype(np.float32)
    kept = nucleus._fewest(x, np.exp(x.astype(np.float64) / 0.3), math.nextafter(7.0, 8.0), 12.0)
    assert kept[:7].all()
