"""Rows that begin alike run together, one of them first; every row runs once."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvern.jobs.prefixes import KEY_CHARACTERS, SHARED, Turns, arrange, key

HEADS = ["", "a" * SHARED, "b" * SHARED, "b" * (2 * SHARED), "c" * (SHARED - 1), "d" * (SHARED + 5)]
KEYS = st.lists(st.builds(str.__add__, st.sampled_from(HEADS), st.text("xyz", max_size=3)), max_size=30)


@given(KEYS)
def test_rows_keep_their_places_and_groups_begin_alike(keys: list[str]) -> None:
    places = arrange(keys)
    assert sorted(place.rank for place in places) == list(range(len(keys)))
    groups: dict[int, list[int]] = {}
    for index, place in sorted(enumerate(places), key=lambda one: one[1].rank):
        groups.setdefault(place.prefix, []).append(index)
    assert list(groups) == list(range(len(groups)))
    heads = []
    for members in groups.values():
        shared = {keys[index][:SHARED] for index in members}
        assert len(shared) == 1
        assert len(members) == 1 or len(min(shared)) == SHARED
        heads += [head for head in shared if len(head) == SHARED]
    assert len(heads) == len(set(heads))
    equal = [index for _, index in sorted((places[i].rank, i) for i in range(len(keys)))]
    assert all(one < two for one, two in pairwise(equal) if keys[one] == keys[two])


@given(KEYS, st.integers(1, 5), st.randoms(use_true_random=False))
def test_every_row_runs_once_and_no_group_before_its_first(keys: list[str], slots: int, draw: object) -> None:
    places = arrange(keys)
    rows = sorted((place.rank, index, place.prefix) for index, place in enumerate(places))
    turns = Turns([(index, prefix) for _, index, prefix in rows])
    running: list[int] = []
    ended: set[int] = set()
    taken: list[int] = []
    while not turns.empty or running:
        line = turns.take() if len(running) < slots else None
        if line is None:
            assert running, "nothing runs and nothing can start"
            done = running.pop(draw.randrange(len(running)))  # type: ignore[attr-defined]
            ended.add(done)
            turns.done(done)
            continue
        group = [index for _, index, prefix in rows if prefix == places[line].prefix]
        assert line == group[0] or group[0] in ended
        running.append(line)
        taken.append(line)
    assert sorted(taken) == list(range(len(keys)))
    assert turns.take() is None


def test_groups_warm_up_side_by_side() -> None:
    turns = Turns([(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)])
    assert [turns.take() for _ in range(4)] == [1, 3, 5, None]
    turns.done(3)
    assert [turns.take() for _ in range(2)] == [4, None]
    assert not turns.empty
    turns.done(1)
    assert turns.take() == 2
    assert turns.empty


def test_keys_begin_with_what_the_model_reads_first() -> None:
    tools, messages = [{"type": "function"}], [{"role": "user", "content": "hi"}]
    asked = {"model": "m", "messages": messages, "temperature": 0, "tools": tools}
    assert key(asked) == '[[{"type": "function"}], [{"role": "user", "content": "hi"}]]'
    assert key({"prompt": "x"}) == '["x"]'
    assert key({"input": "x", "instructions": "do"}) == '["do", "x"]'
    assert len(key({"prompt": "x" * 5000})) == KEY_CHARACTERS
