"""Rows are a pure function of (seed, index): every token once an epoch, whoever asks, in whatever order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.conftest import InMemory

from kvern.data.order import order
from kvern.data.packing import best_fit
from kvern.data.row_stream import Row, RowStream, Source
from kvern.errors import ConfigError, DataError

DOCUMENTS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
"""Lengths of documents."""


def numbered(lengths: Sequence[int], first: int = 0) -> InMemory:
    """Documents whose tokens are all different."""
    starts = np.cumsum([first, *lengths])
    return InMemory([list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)])


def epoch(stream: RowStream, number: int) -> list[Row]:
    return [stream.row(number * len(stream) + index) for index in range(len(stream))]


def tokens(rows: Sequence[Row]) -> Counter[int]:
    return Counter(int(token) for row in rows for token in row.tokens)


def equal(one: Row, other: Row) -> bool:
    marks = [None if row.learned is None else row.learned.tolist() for row in (one, other)]
    return one.tokens.tolist() == other.tokens.tolist() and one.lengths == other.lengths and marks[0] == marks[1]


@given(lengths=DOCUMENTS, others=DOCUMENTS, length=st.integers(2, 30), seed=st.integers(0, 5))
def test_an_epoch_holds_every_token_once(lengths: list[int], others: list[int], length: int, seed: int) -> None:
    first, second = numbered(lengths), numbered(others, 1000)
    stream = RowStream([Source(first), Source(second)], length, seed)
    all_tokens = Counter(token for one in (first, second) for document in one.documents for token in document)
    for number in (0, 1, 7):
        rows = epoch(stream, number)
        assert tokens(rows) == all_tokens
        assert sorted(len(row.tokens) for row in rows)[1:] == [length] * (len(rows) - 1)


@given(lengths=DOCUMENTS, length=st.integers(1, 50))
def test_a_row_is_cut_into_shorter_documents_and_keeps_its_tokens(lengths: list[int], length: int) -> None:
    row = Row(np.arange(sum(lengths)), tuple(lengths), None)
    short = row.cut(length)
    assert short.tokens is row.tokens
    assert max(short.lengths) <= length
    assert set(np.cumsum(lengths)) <= set(np.cumsum(short.lengths))
    assert len(short.lengths) == sum(-(-one // length) for one in lengths)


@given(lengths=DOCUMENTS, length=st.integers(2, 30))
def test_documents_never_mix_and_keep_their_order(lengths: list[int], length: int) -> None:
    documents = numbered(lengths)
    of = {token: number for number, document in enumerate(documents.documents) for token in document}
    for row in epoch(RowStream([Source(documents)], length), 0):
        assert sum(row.lengths) == len(row.tokens) <= length
        for part in np.split(row.tokens, np.cumsum(row.lengths)[:-1]):
            assert len({of[int(token)] for token in part}) == 1
            assert list(part) == list(range(part[0], part[0] + len(part)))


@given(lengths=DOCUMENTS, length=st.integers(2, 30))
def test_a_rest_begins_the_next_row(lengths: list[int], length: int) -> None:
    """Put back into their order, the rows are the documents one after the other."""
    documents = numbered(lengths)
    stream = RowStream([Source(documents)], length)
    plan = stream._at(0)
    rows = [stream._cut_row(plan, number) for number in range(len(stream))]
    joined = [int(token) for row in rows for token in row.tokens]
    mixed = [documents.documents[int(number)] for number in plan.pieces.documents]
    assert joined == [token for document in mixed for token in document]


@given(
    lengths=DOCUMENTS,
    whole=DOCUMENTS,
    weight=st.sampled_from([0.3, 0.5, 1.0, 2.0, 2.5]),
    calls=st.randoms(use_true_random=False),
)
def test_any_order_of_calls_gives_the_same_rows(
    lengths: list[int], whole: list[int], weight: float, calls: Random
) -> None:
    sources = [Source(numbered(lengths), weight), Source(numbered(whole, 1000), weight, whole=True)]
    sequential = [row for number in range(3) for row in epoch(RowStream(sources, 40, 3), number)]
    indices = list(range(len(sequential)))
    calls.shuffle(indices)
    again = RowStream(sources, 40, 3)
    assert all(equal(again.row(index), sequential[index]) for index in indices)


@given(world=st.integers(1, 6), lengths=DOCUMENTS)
def test_the_count_of_processes_changes_nothing(world: int, lengths: list[int]) -> None:
    streams = [RowStream([Source(numbered(lengths))], 8, 1) for _ in range(world)]  # one a process
    alone = RowStream([Source(numbered(lengths))], 8, 1)
    assert all(equal(streams[index % world].row(index), alone.row(index)) for index in range(24))


@given(lengths=DOCUMENTS, weight=st.floats(0.05, 3.5), whole=st.booleans())
def test_shares_of_consecutive_epochs_add_up(lengths: list[int], weight: float, whole: bool) -> None:
    """After any epoch, no token (no packed row) has been taken twice more often than another."""
    stream = RowStream([Source(numbered(lengths), weight, whole)], 40)
    taken: Counter[int] = Counter(dict.fromkeys(range(sum(lengths)), 0))
    for number in range(5):
        taken.update(tokens(epoch(stream, number)))
        counts = [taken[token] for token in range(sum(lengths))]
        assert max(counts) - min(counts) <= 1


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40), length=st.integers(20, 60))
def test_whole_documents_are_never_cut(lengths: list[int], length: int) -> None:
    documents = numbered(lengths)
    stream = RowStream([Source(documents, whole=True)], length)
    for number in (0, 1):
        parts = [
            tuple(int(token) for token in part)
            for row in epoch(stream, number)
            for part in np.split(row.tokens, np.cumsum(row.lengths)[:-1])
        ]
        assert sorted(parts) == sorted(tuple(document) for document in documents.documents)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_best_fit_needs_little_more_than_the_least(lengths: list[int]) -> None:
    rows = best_fit(np.array(lengths), 50, 0)
    assert sorted(int(document) for row in rows for document in row) == list(range(len(lengths)))
    assert all(sum(lengths[document] for document in row) <= 50 for row in rows)
    least = -(-sum(lengths) // 50)
    assert len(rows) <= max(1.5 * least + 1, sum(length > 25 for length in lengths))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    sources = [Source(numbered([5] * 50))]
    firsts = {tuple(RowStream(sources, 20, seed).row(number * 13).tokens) for seed in range(3) for number in range(3)}
    assert len(firsts) == 9


def test_a_long_document_does_not_fill_a_batch() -> None:
    stream = RowStream([Source(numbered([10_000, *[10] * 1000]))], 100)
    first = [stream.row(index) for index in range(20)]
    assert 2 < sum(row.lengths == (100,) for row in first) < 18


def test_marks_follow_their_tokens() -> None:
    chats = InMemory([[1, 2, 3], [4, 5]], [[False, True, False], [True, False]])
    stream = RowStream([Source(chats), Source(InMemory([[6, 7]]))], 4, 2)
    learned = {
        int(token): bool(mark)
        for row in epoch(stream, 0)
        for token, mark in zip(row.tokens, np.ones(4) if row.learned is None else row.learned, strict=False)
    }
    assert learned == {1: False, 2: True, 3: False, 4: True, 5: False, 6: True, 7: True}


def test_orders_are_the_same_for_ever() -> None:
    """A resumed run depends on these numbers: change them only with the version of the format."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]  # SplitMix64, seed 0
    assert order(4).tolist() == sorted(range(4), key=published.__getitem__)
    assert order(8, 3, 1, -1).tolist() == [5, 3, 0, 4, 7, 1, 6, 2]
    rows = RowStream([Source(numbered([3, 1, 4, 1, 5])), Source(numbered([2, 2], 20), 1.5, whole=True)], 5, 7)
    assert [rows.row(index).tokens.tolist() for index in range(6)] == [
        [22, 23, 20, 21],
        [9, 10, 11, 12, 13],
        [4, 5, 6, 7],
        [22, 23, 20, 21],
        [8, 0, 1, 2, 3],
        [4, 5, 6, 7, 9],
    ]


def test_what_is_refused() -> None:
    documents = numbered([3, 12, 30])
    with pytest.raises(ConfigError, match="nothing to train on"):
        RowStream([], 8)
    with pytest.raises(ConfigError, match="at least 2 tokens, not 1"):
        RowStream([Source(documents)], 1)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="above 0") as refused:
            RowStream([Source(documents, weight)], 8)
        assert refused.value.param == "sources.0.weight"
    with pytest.raises(DataError, match=r"^memory:2: 30 tokens, and a row holds 8 \(1 more are too long as well\)$"):
        RowStream([Source(documents, whole=True)], 8)
    with pytest.raises(DataError, match="no documents"):
        RowStream([Source(InMemory([]))], 8)
    with pytest.raises(IndexError):
        RowStream([Source(documents)], 8).row(-1)


def test_the_fingerprint_names_all_that_rows_depend_on() -> None:
    documents, other = numbered([3, 9]), InMemory([[1]], digest="other")
    streams = [
        RowStream([Source(documents)], 8),
        RowStream([Source(documents)], 9),
        RowStream([Source(documents)], 8, 1),
        RowStream([Source(documents, 2.0)], 8),
        RowStream([Source(documents, whole=True)], 9),
        RowStream([Source(other)], 8),
    ]
    assert len({stream.fingerprint for stream in streams}) == len(streams)
    assert RowStream([Source(documents)], 8).fingerprint == streams[0].fingerprint
