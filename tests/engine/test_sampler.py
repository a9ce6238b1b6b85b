"""The sampler against its formulas written out slowly, its statistics, and its independence of the batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, currently_in_test_context, given, settings
from hypothesis import strategies as st

from kvern.engine.params import SamplingParams
from kvern.engine.sampler import Row, Sampled, logprobs_of, sample, uniform
from kvern.errors import BadRequestError, NonFiniteLogitsError

GREEDY = SamplingParams(max_tokens=8)
RANDOM = SamplingParams(max_tokens=8, temperature=1.0)
CLOSE = 1e-9
"""Distance from a boundary within which rounding may decide; hypothesis draws another example there."""


def clear(of_boundaries: bool) -> None:
    """Drop the example at hand where rounding may decide."""
    if currently_in_test_context():
        assume(of_boundaries)


def row(params: SamplingParams, seed: int = 0, tokens: Sequence[int] = (0,), prompt_length: int = 1) -> Row:
    return Row(params, seed, tokens, prompt_length)


def one(logits: Sequence[float] | torch.Tensor, which: Row) -> Sampled:
    return sample(torch.as_tensor(logits, dtype=torch.float32)[None], [which])[0]


def edited(logits: Sequence[float], which: Row) -> list[float]:
    """Masks, bias and penalties, one id at a time."""
    params, answer = which.params, list(which.tokens[which.prompt_length :])
    x = list(logits[: params.vocab_limit])
    for token in range(len(x)):
        if len(answer) < params.min_tokens and token in which.stops:
            x[token] = -math.inf
        x[token] += sum(bias for biased, bias in params.logit_bias if biased == token)
        if token in which.tokens:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        x[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty * (token in answer)
    return x


def distribution(logits: Sequence[float], which: Row) -> dict[int, float]:
    """Probability of every id that can be drawn, by sorting everything."""
    params, x = which.params, edited(logits, which)
    weights = {token: math.exp((value - max(x)) / params.temperature) for token, value in enumerate(x)}
    clear(all(abs(weight - params.min_p) > CLOSE for weight in weights.values()) or params.min_p in (0, 1))
    order = sorted((t for t in weights if weights[t] >= params.min_p), key=lambda t: (-x[t], t))
    order = order[: params.top_k or None]
    total = math.fsum(weights[t] for t in order)
    kept, before = [], 0.0
    for token in order:
        clear(params.top_p == 1 or abs(before - params.top_p * total) > CLOSE * total)
        if before < params.top_p * total:
            kept.append(token)
        before += weights[token]
    total = math.fsum(weights[t] for t in kept)
    return {token: weights[token] / total for token in sorted(kept)}


def reference(logits: Sequence[float], which: Row) -> int:
    """The token that must come out."""
    if which.params.temperature < 1e-5:
        x = edited(logits, which)
        return x.index(max(x))
    u, before = uniform(which.seed, len(which.tokens)), 0.0
    probabilities = distribution(logits, which)
    for token, probability in probabilities.items():
        before += probability
        clear(abs(before - u) > CLOSE)
        if u < before:
            return token
    raise AssertionError(f"probabilities sum to {before}, u is {u}")


def numbers(least: float, most: float) -> st.SearchStrategy[float]:
    """Multiples of 2^-10: ties are frequent, and no difference is so small that it rounds away."""
    return st.integers(math.ceil(least * 1024), math.floor(most * 1024)).map(lambda x: x / 1024)


LOGIT = st.one_of(st.sampled_from([x / 2 for x in range(-8, 9)]), numbers(-30, 30), st.just(-math.inf))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], Row]:
    logits = draw(st.lists(LOGIT, min_size=draw(st.sampled_from([2, 12])), max_size=40))
    ids = st.integers(0, len(logits) - 1)
    tokens = draw(st.lists(ids, min_size=1, max_size=20))
    options: dict[str, Any] = {
        "temperature": st.sampled_from([0.7, 1.0, 2.5, 8.0, 100.0, 0.05, 1e-6, 0.0]),
        "top_p": st.one_of(st.just(1.0), numbers(0.01, 1.0)),
        "top_k": st.one_of(st.just(0), st.integers(1, 8), st.integers(1, 50)),
        "min_p": st.one_of(st.just(0.0), numbers(0.001, 1.0)),
        "presence_penalty": st.one_of(st.just(0.0), numbers(-2, 2)),
        "frequency_penalty": st.one_of(st.just(0.0), numbers(-2, 2)),
        "repetition_penalty": st.one_of(st.just(1.0), numbers(0.5, 2)),
        "logit_bias": st.lists(st.tuples(ids, numbers(-100, 100)), max_size=3).map(tuple),
        "min_tokens": st.integers(0, 8),
        "vocab_limit": st.one_of(st.none(), st.integers(2, len(logits))),
    }
    params = SamplingParams(max_tokens=9, **{name: draw(strategy) for name, strategy in options.items()})
    which = Row(
        params,
        draw(st.integers(-(2**63), 2**64)),
        tokens,
        draw(st.integers(1, len(tokens))),
        draw(st.frozensets(ids, max_size=2)),
    )
    return logits, which


@settings(max_examples=1000)
@given(cases())
def test_equals_the_slow_reference(case: tuple[list[float], Row]) -> None:
    logits, which = case
    got = one(logits, which)
    if max(logits[: which.params.vocab_limit]) == -math.inf:
        assert isinstance(got.error, NonFiniteLogitsError)
    elif max(edited(logits, which)) == -math.inf:
        assert isinstance(got.error, BadRequestError)
    else:
        assert got == Sampled(reference(logits, which))


@settings(max_examples=120)
@given(st.lists(cases(), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_the_others(batch: list[tuple[list[float], Row]], random: Any) -> None:
    width = max(len(logits) for logits, _ in batch)
    padded = [logits + [-math.inf] * (width - len(logits)) for logits, _ in batch]
    rows = [replace(which, params=replace(which.params, logprobs=2)) for _, which in batch]
    alone = [one(logits, which) for logits, which in zip(padded, rows, strict=True)]
    order = random.sample(range(len(rows)), len(rows))
    together = sample(torch.tensor([padded[i] for i in order]), [rows[i] for i in order])
    for got, index in zip(together, order, strict=True):
        assert (got.token, got.logprob) == (alone[index].token, alone[index].logprob)
        assert type(got.error) is type(alone[index].error)


CUTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6, "top_p": 0.95},
    {"top_k": 50},
    {"top_k": 200, "top_p": 0.9},
    {"min_p": 0.02},
    {"temperature": 3.0, "top_p": 0.5},
    {"min_p": 0.001, "top_k": 1000, "top_p": 0.99},
]


VOCABULARY = 151_936


def shaped(shape: str) -> torch.Tensor:
    """Logits of a whole vocabulary."""
    normal = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1))
    peaks = torch.zeros(VOCABULARY)
    peaks[1000:1040] = torch.linspace(4, 16, 40)
    return {
        "wide": normal * 3,
        "ties": (normal * 12).round() / 4,
        "narrow": normal * 0.1,
        "flat": torch.zeros(VOCABULARY),
        "two levels": (normal > 0.5).float() * 2,
        "peaks over normal": normal * 2 + peaks,
        "peaks over a plain": peaks + 4,
        "peaks over nothing": peaks.log() + 4,
        "one far above": torch.where(torch.arange(VOCABULARY) == 77, 3e38, normal),
        "many far below": torch.where(normal > 2, normal, -3e38),
    }[shape]


SHAPES = [
    "wide",
    "ties",
    "narrow",
    "flat",
    "two levels",
    "peaks over normal",
    "peaks over a plain",
    "peaks over nothing",
    "one far above",
    "many far below",
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", CUTS, ids=str)
def test_a_whole_vocabulary(options: dict[str, Any], shape: str) -> None:
    logits = shaped(shape)
    params = replace(RANDOM, vocab_limit=151_643, **options)
    x = logits.double().numpy()[:151_643]
    x = (x - x.max()) / params.temperature
    weights = np.exp(x)
    order = np.argsort(-x, kind="stable")
    order = order[weights[order] >= params.min_p][: params.top_k or None]
    before = np.concatenate([[0.0], weights[order].cumsum()])
    kept = np.sort(order[before[:-1] < params.top_p * before[-1]])
    shares = (weights[kept] / weights[kept].sum()).cumsum()
    for position in range(1, 20):
        u = uniform(7, position)
        expected = kept[np.searchsorted(shares, u, side="right")]
        if np.abs(shares - u).min() > 1e-10:
            assert one(logits, row(params, 7, [0] * position)).token == expected


def chi_square(counts: Counter[int], probabilities: dict[int, float], draws: int) -> float:
    return sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in probabilities.items())


STATISTICS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.15},
    {"presence_penalty": 1.5, "frequency_penalty": 0.4},
    {"repetition_penalty": 1.7},
    {"logit_bias": ((5, 3.0), (0, -2.0))},
]


@pytest.mark.parametrize("options", STATISTICS, ids=str)
def test_frequencies_follow_the_formulas(options: dict[str, Any]) -> None:
    logits = [2.0, 1.5, 1.0, 0.0, -0.5, -1.0, -2.0, 0.5]
    which = row(replace(RANDOM, **options), tokens=[6, 0, 1, 1, 3], prompt_length=2)
    expected = distribution(logits, which)
    draws = 6000
    rows = [replace(which, seed=seed) for seed in range(draws)]
    counts = Counter(got.token for got in sample(torch.tensor([logits] * draws), rows))
    assert set(counts) <= set(expected)
    freedom = len(expected) - 1
    assert chi_square(counts, expected, draws) < freedom + 4 * math.sqrt(2 * freedom)


def test_splitmix64_is_the_published_generator() -> None:
    from kvern.engine.sampler import _mix

    assert _mix(0) == 0xE220A8397B1DCDAF
    assert _mix(1234567) == 6457827717110365317


@pytest.mark.parametrize("along", ["positions", "seeds", "both"])
def test_the_numbers_are_uniform_and_neighbours_are_independent(along: str) -> None:
    step = {"positions": (0, 1), "seeds": (1, 0), "both": (1, 1)}[along]
    drawn = [uniform(step[0] * i, step[1] * i) for i in range(20_001)]
    assert all(0 <= u < 1 for u in drawn)
    pairs = Counter(8 * int(8 * a) + int(8 * b) for a, b in pairwise(drawn))
    assert chi_square(pairs, dict.fromkeys(range(64), 1 / 64), 20_000) < 63 + 4 * math.sqrt(2 * 63)


def test_position_is_not_added_to_the_seed() -> None:
    assert len({uniform(seed, position) for seed in range(30) for position in range(30)}) == 900


def test_the_seed_decides_and_nothing_else() -> None:
    logits = torch.zeros(1, 1000)
    tokens = [sample(logits, [row(RANDOM, seed, [0] * n)])[0].token for seed in (1, 2) for n in range(1, 30)]
    again = [sample(logits, [row(RANDOM, seed, [0] * n)])[0].token for seed in (1, 2) for n in range(1, 30)]
    assert tokens == again
    assert tokens[:29] != tokens[29:]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "top_k": 1}, {"presence_penalty": 0.0, "top_k": 1}], ids=str
)
def test_ties_go_to_the_lower_id(options: dict[str, Any]) -> None:
    assert one([0.0, 3.0, 1.0, 3.0, 3.0], row(replace(GREEDY, **options))).token == 1


def test_exactly_top_k_of_tied_ids_stay() -> None:
    drawn = {one([1.0] * 6, row(replace(RANDOM, top_k=4), seed)).token for seed in range(200)}
    assert drawn == {0, 1, 2, 3}


@pytest.mark.parametrize(("share", "kept"), [(0.5, 2), (0.75, 3), (0.5000001, 3), (1.0, 4), (0.0, 1), (0.25, 1)])
def test_top_p_stops_as_soon_as_it_is_reached(share: float, kept: int) -> None:
    drawn = {one([1.0] * 4, row(replace(RANDOM, top_p=share), seed)).token for seed in range(200)}
    assert drawn == set(range(kept))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"min_p": 0.6}, 2),
        ({"min_p": 0.6, "top_k": 3}, 2),
        ({"min_p": 0.1, "top_k": 3}, 3),
        ({"top_p": 0.5}, 2),
        ({"top_p": 0.5, "min_p": 0.6}, 1),  # 0.4 of the 0.7 that min_p left
        ({"top_p": 0.5, "top_k": 2}, 1),
        ({"top_p": 0.8, "top_k": 3}, 3),  # 0.7 of 0.9 is not enough
        ({"top_p": 0.7, "top_k": 3, "min_p": 0.1}, 2),
    ],
    ids=str,
)
def test_min_p_then_top_k_then_top_p_of_what_is_left(options: dict[str, Any], kept: int) -> None:
    logits = [math.log(probability) for probability in (0.4, 0.3, 0.2, 0.1)]
    drawn = {one(logits, row(replace(RANDOM, **options), seed)).token for seed in range(200)}
    assert drawn == set(range(kept))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(bad: float, temperature: float) -> None:
    logits = torch.zeros(3, 5)
    logits[:, 2] = 9.0
    logits[1, 4] = bad
    params = replace(GREEDY, temperature=temperature, logprobs=1)
    first, second, third = sample(logits, [row(params, seed=s) for s in range(3)])
    assert isinstance(second.error, NonFiniteLogitsError)
    assert second.token == -1
    assert first.error is None
    assert third.error is None
    assert third.token == 2


def test_what_lies_above_the_vocabulary_does_not_matter() -> None:
    params = replace(GREEDY, vocab_limit=3, logprobs=5)
    got = one([0.0, 2.0, 1.0, math.nan, 99.0], row(params))
    assert got.error is None
    assert got.token == 1
    assert got.logprob == one([0.0, 2.0, 1.0], row(params)).logprob


def test_stop_ids_are_masked_until_min_tokens() -> None:
    params = replace(GREEDY, min_tokens=2)
    tokens = [
        one([0.0, 9.0, 1.0], Row(params, 0, [0] * (1 + answered), 1, frozenset({1}))).token for answered in range(4)
    ]
    assert tokens == [2, 2, 1, 1]


def test_no_id_left_is_an_error_of_the_row() -> None:
    params = replace(GREEDY, min_tokens=1, vocab_limit=2)
    assert isinstance(one([1.0, 0.0], Row(params, 0, [0], 1, {0, 1})).error, BadRequestError)


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_logprobs_are_those_of_the_raw_logits(temperature: float) -> None:
    logits = [1.0, 3.0, 0.0, 3.0, 2.0]
    params = replace(GREEDY, temperature=temperature, logprobs=3, logit_bias=((1, -50.0), (3, -50.0)), top_k=1)
    got = one(logits, row(params)).logprob
    assert got is not None
    expected = torch.tensor(logits, dtype=torch.float64).log_softmax(-1).tolist()
    assert got.token == 4
    assert got.logprob == pytest.approx(expected[4], abs=1e-12)
    assert [token for token, _ in got.top] == [1, 3, 4]
    assert [value for _, value in got.top] == pytest.approx([expected[1], expected[3], expected[4]], abs=1e-12)


def test_no_logprobs_unless_asked_and_only_the_chosen_at_zero() -> None:
    assert one([0.0, 1.0], row(GREEDY)).logprob is None
    got = one([0.0, 1.0], row(replace(GREEDY, logprobs=0))).logprob
    assert got is not None
    assert got.top == ()


@settings(max_examples=200)
@given(st.lists(st.lists(LOGIT, min_size=7, max_size=7), min_size=1, max_size=5), st.integers(0, 9))
def test_logprobs_of_given_tokens(logits: list[list[float]], count: int) -> None:
    assume(all(max(values) > -math.inf for values in logits))
    tokens = [index % 7 for index in range(len(logits))]
    got = logprobs_of(torch.tensor(logits), tokens, replace(GREEDY, logprobs=count))
    for one_, values, token in zip(got, logits, tokens, strict=True):
        expected = torch.tensor(values, dtype=torch.float64).log_softmax(-1).tolist()
        order = sorted(range(7), key=lambda t: (-values[t], t))[:count]
        assert (one_.token, [t for t, _ in one_.top]) == (token, order)
        assert one_.logprob == pytest.approx(expected[token], abs=1e-9)
        assert [value for _, value in one_.top] == pytest.approx([expected[t] for t in order], abs=1e-9)


def test_logprobs_of_logits_that_are_not_finite_raise() -> None:
    with pytest.raises(NonFiniteLogitsError):
        logprobs_of(torch.tensor([[0.0, math.nan]]), [0], GREEDY)


def test_logprobs_outside_the_vocabulary_are_minus_infinity() -> None:
    assert logprobs_of(torch.zeros(1, 4), [3], replace(GREEDY, vocab_limit=2))[0].logprob == -math.inf
