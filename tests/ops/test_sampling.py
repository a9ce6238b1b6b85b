"""The kernels that draw tokens against the numpy reference: the same tokens, log-probabilities to 1e-12."""

from __future__ import annotations

import ctypes
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvern.ops import library, native_sampling, reference_sampling
from kvern.ops.reference_sampling import Draw, Scored

pytestmark = pytest.mark.skipif(library.library() is None, reason="no native kernels")

SCORE = st.one_of(
    st.integers(-8, 8).map(lambda x: x / 2),
    st.integers(-40_000, 40_000).map(lambda x: x / 1024),
    st.floats(-60, 60, width=32),
    st.just(-math.inf),
)
RARE = st.sampled_from([math.nan, math.inf, -3e38, 3e38])
SHARE = st.one_of(st.integers(0, 1023).map(lambda x: x / 1024), st.floats(0, 1))
UNIFORM = st.floats(0, 1, exclude_max=True)
CLOSE = 1e-12
SHAPES = ["normal", "narrow", "halves", "peaks", "flat", "two levels", "heavy tail", "one far above", "many far below"]


def shaped(shape: str, size: int, seed: int) -> torch.Tensor:
    """Logits [size] of a whole vocabulary."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(size)
    levels = np.where(normal > 0.5, 2.0, 0.0)
    peaks = normal * 2
    peaks[: size // 100] += rng.uniform(4, 16, size // 100)
    rng.shuffle(peaks)
    values = {
        "normal": normal * 3,
        "narrow": normal * 0.1,
        "halves": (normal * 6).round() / 2,
        "peaks": peaks,
        "flat": np.zeros(size),
        "two levels": levels,
        "heavy tail": rng.standard_t(3, size),
        "one far above": np.where(np.arange(size) == size // 3, 3e38, normal),
        "many far below": np.where(normal > 2, normal, -3e38),
    }[shape]
    values[rng.random(size) < rng.choice([0.0, 0.3])] = -math.inf
    values[size // 3] = max(values[size // 3], 0.0)
    return torch.tensor(values, dtype=torch.float32)


def admits(logits: torch.Tensor, one: Draw, token: int) -> bool:
    """Whether `token` comes out by sorting everything, with u, top_p and min_p off by CLOSE at most."""
    x = logits[0, : one.limit].double().numpy()
    if one.edited is not None:
        x[one.edited] = one.scores
    weights = np.exp((x - x.max()) * (1 / one.temperature))
    order = np.argsort(-x, kind="stable")
    for p, m in itertools.product((-CLOSE, 0.0, CLOSE), repeat=2):
        left = order[weights[order] >= min(one.min_p * (1 + m), 1.0)][: one.top_k or None]
        sums = weights[left].cumsum()
        count = len(left) if one.top_p == 1 else int((sums < (one.top_p + p) * sums[-1]).sum()) + 1
        ids = np.sort(left[:count])
        shares = weights[ids].cumsum() / weights[ids].sum()
        at = int(np.searchsorted(ids, token))
        if at < len(ids) and ids[at] == token:
            before = shares[at - 1] if at else 0.0
            if before - CLOSE <= one.uniform <= shares[at] + CLOSE:
                return True
    return False


def check(logits: torch.Tensor, one: Draw) -> None:
    """The reference's token; where it is another, then one that a change by CLOSE allows."""
    got, expected = native_sampling.draw(logits, [one]), reference_sampling.draw(logits, [one])
    assert got == expected or (got[0] >= 0 and one.temperature > 0 and admits(logits, one, got[0]))


@st.composite
def options(draw: st.DrawFn, size: int) -> dict[str, Any]:
    count = draw(st.integers(0, min(size, 4)))
    ids = draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count, unique=True).map(sorted))
    scores = draw(st.lists(st.one_of(SCORE, SCORE, SCORE, st.floats()), min_size=len(ids), max_size=len(ids)))
    return {
        "limit": draw(st.one_of(st.just(size), st.integers(max(ids, default=0) + 1, size))),
        "temperature": draw(st.sampled_from([0.0, 1e-5, 0.05, 0.7, 1.0, 2.5, 100.0, 1e30])),
        "top_p": draw(st.one_of(st.just(1.0), SHARE)),
        "top_k": draw(st.one_of(st.just(0), st.integers(1, 8), st.integers(1, 2 * size))),
        "min_p": draw(st.one_of(st.just(0.0), st.just(1.0), SHARE)),
        "uniform": draw(UNIFORM),
        "edited": np.array(ids, np.int64) if ids else None,
        "scores": np.array(scores, np.float64) if ids else None,
    }


@settings(max_examples=500)
@given(st.data())
def test_the_same_token_from_a_small_vocabulary(data: st.DataObject) -> None:
    size = data.draw(st.one_of(st.integers(1, 4), st.integers(5, 60)))
    score = st.one_of(SCORE, SCORE, SCORE, RARE) if data.draw(st.booleans()) else SCORE
    logits = torch.tensor([data.draw(st.lists(score, min_size=size, max_size=size))])
    check(logits, Draw(**data.draw(options(size))))


@settings(max_examples=150)
@given(st.sampled_from(SHAPES), st.integers(0, 10**6), st.data())
def test_the_same_token_from_thousands(shape: str, seed: int, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1000, 4096, 9999]))
    check(shaped(shape, size, seed)[None], Draw(**data.draw(options(size))))


CUTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_p": 0.95},
    {"top_k": 50},
    {"top_k": 5000, "top_p": 0.9},
    {"min_p": 0.02},
    {"temperature": 3.0, "top_p": 0.5},
    {"min_p": 0.001, "top_k": 1000, "top_p": 0.99},
    {"top_p": 0.999999},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_tokens_from_a_whole_vocabulary(shape: str) -> None:
    logits = shaped(shape, 129_280, 3)[None]
    edits: dict[str, Any] = {"edited": np.array([5, 77, 99_000]), "scores": np.array([1.5, -math.inf, 3.0000000001])}
    for i, cuts in enumerate(CUTS):
        for u in (0.013, 0.37, 0.92):
            one = {"limit": 129_280 - i, "temperature": 1.0, "uniform": u, **cuts}
            check(logits, Draw(**one))
            check(logits, Draw(**one, **edits))


@settings(max_examples=100)
@given(st.data())
def test_log_probabilities(data: st.DataObject) -> None:
    size = data.draw(st.one_of(st.integers(1, 4), st.integers(5, 60), st.just(2000)))
    if size == 2000:
        logits = shaped(data.draw(st.sampled_from(SHAPES)), size, data.draw(st.integers(0, 1000)))[None]
    else:
        logits = torch.tensor([data.draw(st.lists(st.one_of(SCORE, SCORE, RARE), min_size=size, max_size=size))])
    limit = data.draw(st.integers(1, size))
    one = Scored(limit, data.draw(st.integers(0, size)), data.draw(st.integers(0, size + 2)))
    got, expected = native_sampling.logprobs(logits, [one])[0], reference_sampling.logprobs(logits, [one])[0]
    if got is None or expected is None:
        assert got is expected
        return
    assert [token for token, _ in got[1]] == [token for token, _ in expected[1]]
    for mine, theirs in zip(
        [got[0], *(p for _, p in got[1])], [expected[0], *(p for _, p in expected[1])], strict=True
    ):
        assert mine == theirs or mine == pytest.approx(theirs, rel=1e-12, abs=1e-12)


def test_a_row_depends_on_itself_alone() -> None:
    logits = torch.stack([shaped(SHAPES[i % len(SHAPES)], 3000, i) for i in range(18)])
    draws = [Draw(3000, 0.9, top_p=0.9 if i % 2 else 1.0, top_k=40 * (i % 3), uniform=i / 18) for i in range(18)]
    alone = [native_sampling.draw(logits[i : i + 1], [one])[0] for i, one in enumerate(draws)]
    before = library.threads()
    try:
        for count in (1, 2, 5):
            library.set_threads(count)
            assert native_sampling.draw(logits, draws) == alone
            assert native_sampling.draw(logits.flip(0), draws[::-1]) == alone[::-1]
    finally:
        library.set_threads(before)


def test_rows_that_lie_apart() -> None:
    wide = torch.stack([shaped("normal", 1000, i) for i in range(6)])
    apart = wide[::2, :900]
    draws = [Draw(900, 1.0, uniform=0.4)] * 3
    assert native_sampling.draw(apart, draws) == native_sampling.draw(apart.contiguous(), draws)
    assert native_sampling.draw(wide.T[:6], [Draw(6, 1.0, uniform=0.4)] * 6) == reference_sampling.draw(
        wide.T[:6], [Draw(6, 1.0, uniform=0.4)] * 6
    )


HOSTILE: list[dict[str, Any]] = [
    {"size": 0},
    {"size": -1},
    {"size": 1 << 31},
    {"logits": None},
    {"edits": -1},
    {"edits": 2, "edited": None},
    {"edits": 1, "scores": None},
    {"top_k": -1},
    {"temperature": -1.0},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": 1e-310},
    {"top_p": -0.1},
    {"top_p": 1.1},
    {"top_p": math.nan},
    {"min_p": 1.5},
    {"min_p": math.nan},
    {"uniform": 1.0},
    {"uniform": -1e-9},
    {"uniform": math.nan},
]


@pytest.mark.parametrize("wrong", HOSTILE, ids=str)
def test_hostile_parameters_are_refused(wrong: dict[str, Any]) -> None:
    logits, edited, scores = (ctypes.c_float * 4)(), (ctypes.c_int64 * 2)(1, 3), (ctypes.c_double * 2)()
    sound: dict[str, Any] = {
        "logits": ctypes.addressof(logits),
        "edited": ctypes.addressof(edited),
        "scores": ctypes.addressof(scores),
        "size": 4,
        "edits": 2,
        "temperature": 1.0,
        "top_p": 0.5,
    }
    ids = (ctypes.c_int64 * 1)(-9)
    row = native_sampling.DrawRow(**{**sound, **wrong})
    assert library.loaded().kvern_sample(ctypes.byref(row), 1, ids) == 1
    assert ids[0] == -9
    assert library.loaded().kvern_sample(ctypes.byref(native_sampling.DrawRow(**sound)), 1, ids) == 0
    edited[1] = 4
    assert library.loaded().kvern_sample(ctypes.byref(native_sampling.DrawRow(**sound)), 1, ids) == 1
