"""Stored responses: theirs alone, until they expire."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvern.store import Store, responses
from kvern.store.responses import StoredResponse


@pytest.fixture
def store(where: str) -> Iterator[Store]:
    opened = Store(where)
    yield opened
    opened.close()


def stored(owner: str = "a", response_id: str = "resp_1", expires: int = 100, text: str = "é\x00") -> StoredResponse:
    items = [{"id": "msg_1", "type": "message", "content": [{"type": "input_text", "text": text}]}]
    return StoredResponse(owner, response_id, 7, expires, items, {"id": response_id, "status": "completed"})


def get(store: Store, owner: str, response_id: str, now: float) -> StoredResponse | None:
    with store.read() as connection:
        return responses.get(connection, owner, response_id, now)


def test_what_was_saved_comes_back_to_its_owner(store: Store) -> None:
    with store.write() as connection:
        responses.save(connection, stored())
        responses.save(connection, stored("b", text="another's of the same id"))
        responses.save(connection, stored("a", text="in its place"))
    assert get(store, "a", "resp_1", 9) == stored("a", text="in its place")
    assert get(store, "b", "resp_1", 9) == stored("b", text="another's of the same id")
    assert get(store, "c", "resp_1", 9) is None
    with store.write() as connection:
        assert responses.remove(connection, "a", "resp_1")
        assert not responses.remove(connection, "a", "resp_1")
    assert get(store, "a", "resp_1", 9) is None
    assert get(store, "b", "resp_1", 9) is not None


def test_responses_expire(store: Store) -> None:
    with store.write() as connection:
        for number in range(4):
            responses.save(connection, stored(response_id=f"resp_{number}", expires=10 * number))
    assert [get(store, "a", f"resp_{number}", 20) is not None for number in range(4)] == [False, False, False, True]
    with store.write() as connection:
        assert responses.expire(connection, 20) == 3
    assert [get(store, "a", f"resp_{number}", 0) is not None for number in range(4)] == [False, False, False, True]


def test_a_conversation_is_packed(store: Store) -> None:
    with store.write() as connection:
        responses.save(connection, stored(text="the same words again and again; " * 1000))
        size = len(connection.execute(responses.RESPONSES.select()).one().items)
    assert size < 1000
