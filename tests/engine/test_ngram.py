"""Prompt lookup against plain search, and how it finds back after a renamed symbol."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvern.engine.ngram import LONGEST, NgramDrafter


def longest_match(tokens: list[int]) -> int:
    """Tokens before some earlier place that equal the last tokens, searched plainly; at most LONGEST."""
    lengths = range(min(LONGEST, len(tokens) - 1), 0, -1)
    return next((n for n in lengths if any(tokens[p - n : p] == tokens[-n:] for p in range(n, len(tokens)))), 0)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 9))
def test_a_proposal_follows_tokens_like_the_last(tokens: list[int], count: int) -> None:
    proposal = NgramDrafter(tokens).propose(count)
    if longest_match(tokens) < 2:
        assert proposal is None
        return
    assert proposal is not None
    source, matched = proposal.source, proposal.matched
    assert matched >= 2
    assert tokens[source - matched : source] == tokens[-matched:]
    assert matched == longest_match(tokens) or tokens.count(tokens[-1]) > 8
    longer = [*tokens, *proposal.tokens]
    assert len(proposal.tokens) == count
    assert longer[source : source + count] == list(proposal.tokens)


@given(st.lists(st.integers(0, 5), min_size=3, max_size=40))
def test_tokens_that_come_one_by_one_are_taken_up_as_all_at_once(tokens: list[int]) -> None:
    growing = tokens[:1]
    drafter = NgramDrafter(growing)
    for token in tokens[1:]:
        drafter.propose(2)
        growing.append(token)
    assert drafter.propose(4) == NgramDrafter(tokens).propose(4)


def test_after_a_renamed_symbol_one_equal_token_finds_back() -> None:
    """99 stands everywhere, so it alone tells nothing; near the last source it does."""
    original = [token for name in range(10, 30) for token in (name, 50, name + 100, 99)]
    tokens = [*original, 1, *original[:20]]
    drafter = NgramDrafter(tokens)
    proposal = drafter.propose(8)
    assert proposal is not None
    assert list(proposal.tokens) == original[20:28]
    tokens += [*original[20:22], 7, 8]  # two tokens for the third, as a new name may have
    drafter.settle(proposal, right=2, emitted=4)
    assert drafter.propose(8) is None
    tokens.append(99)
    drafter.settle(None, right=0, emitted=1)
    proposal = drafter.propose(8)
    assert proposal is not None
    assert list(proposal.tokens) == original[24:32]


def test_a_place_that_was_lost_is_forgotten() -> None:
    tokens = [1, 2, 3, 4, 5, 9, 1, 2]
    drafter = NgramDrafter(tokens)
    drafter.settle(drafter.propose(2), right=1, emitted=1)
    for token in range(20, 60):
        tokens.append(token)
        drafter.settle(None, right=0, emitted=1)
    tokens.append(4)
    assert drafter.propose(1) is None


@pytest.mark.parametrize("tokens", [[0] * 4000, [0, 1] * 2000], ids=["one token", "two tokens"])
def test_a_proposal_costs_the_same_however_much_repeats(tokens: list[int]) -> None:
    drafter = NgramDrafter(tokens)
    drafter.propose(16)
    start = time.process_time()
    for _ in range(200):
        tokens.append(tokens[-2])
        drafter.propose(16)
    assert time.process_time() - start < 1.0
