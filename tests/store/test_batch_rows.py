"""Rows end once, whoever is second; counts, files and the cache move with them. Over both databases."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from kvern.jobs.asking import Answer, Question
from kvern.jobs.batch import BatchRunner, Model
from kvern.jobs.batch_input import Limits
from kvern.store import Store, batch_rows, batches, files
from kvern.store.batch_rows import Result, Row, Tokens
from kvern.store.batches import Batch

URL = "/v1/completions"


@pytest.fixture
def store(where: str) -> Iterator[Store]:
    opened = Store(where)
    with opened.write() as connection:
        batches.add(
            connection, Batch("b", "o", "m", URL, "f", "24h", 1, tags={"a": "b"}, status="in_progress", total=4)
        )
        rows = [Row(n, f"row {n}", 4 - n, n % 2, b"{}") for n in range(1, 5)]
        batch_rows.fill(connection, "b", rows)
        batch_rows.fill(connection, "b", rows)
    yield opened
    opened.close()


def test_a_row_ends_once(store: Store) -> None:
    with store.write() as connection:
        assert batch_rows.waiting(connection, "b") == [(4, 0), (3, 1), (2, 0), (1, 1)]
        first = Result(3, "output", b"first", 0, Tokens(5, 4, 3, 2), "key", b"body")
        assert batch_rows.record(connection, "b", first, 7)
        for part in ("output", "error"):
            assert not batch_rows.record(connection, "b", Result(3, part, b"second", 1, Tokens(9, 9, 9, 9)), 8)
        batch_rows.fail_rest(connection, "b", [(3, b"late"), (1, b"late"), (2, b"late")], 9)
    with store.read() as connection:
        batch = batches.get(connection, "b", "o")
        assert batch is not None
        assert (batch.completed, batch.failed, batch.reused, batch.tags) == (1, 2, 0, {"a": "b"})
        assert (batch.input_tokens, batch.cached_tokens, batch.output_tokens, batch.reasoning_tokens) == (5, 4, 3, 2)
        assert batch_rows.results(connection, "b", ["output"]) == [(3, b"first")]
        assert batch_rows.results(connection, "b", ["output", "error"], after=1) == [(2, b"late"), (3, b"first")]
        sizes = [files.get(connection, "o", name or "", 9) for name in (batch.output_file_id, batch.error_file_id)]
        assert [file and file.bytes for file in sizes] == [6, 10]
        assert batch_rows.names(connection, "b") == [(4, "row 4")]
        assert batch_rows.answer(connection, "key") == b"body"
        assert batches.get(connection, "b", "somebody else") is None
    with store.write() as connection:
        batch_rows.trim_answers(connection, 0)
        assert batch_rows.answer(connection, "key") is None
        assert sizes[0] is not None
        batch_rows.remove_file(connection, sizes[0])
        assert batch_rows.results(connection, "b", ["output", "error"]) == [(1, b"late"), (2, b"late")]


def test_a_batch_leaves_a_status_once(store: Store) -> None:
    with store.write() as connection:
        assert batches.move(connection, "b", ["in_progress"], "finalizing", 5)
        assert not batches.move(connection, "b", ["in_progress"], "cancelling", 6)
        assert [batch.id for batch in batches.open_for(connection, "m")] == ["b"]
        assert batches.move(connection, "b", ["finalizing"], "completed", 7)
        assert batches.open_for(connection, "m") == []
        done = batches.get(connection, "b")
        assert done is not None
        assert (done.status, done.finalizing_at, done.completed_at, done.cancelling_at) == ("completed", 5, 7, None)


def test_two_runners_at_once_record_each_row_once(store: Store) -> None:
    """Nothing lets two work on one batch; if anything did, it would still be right."""
    lines = [
        json.dumps({"custom_id": str(n), "method": "POST", "url": URL, "body": {"model": "m", "prompt": str(n)}})
        for n in range(60)
    ]
    content = "\n".join(lines).encode()
    with store.write() as connection:
        file = files.File("file-1", "o", "batch", "in.jsonl", len(content), 1)
        files.add(connection, file)
        files.write(connection, file.id, [content[:777], content[777:]])
        batches.add(connection, Batch("c", "o", "m", URL, file.id, "24h", 1))

    async def ask(question: Question) -> Answer:
        await asyncio.sleep(0.002)
        body = {"text": json.loads(question.body)["prompt"], "usage": {"prompt_tokens": 2, "completion_tokens": 1}}
        return Answer(200, json.dumps(body).encode(), "r")

    async def both() -> None:
        model = Model("m", "r", lambda _: True)
        runners = [BatchRunner(store, model, ask, limits=Limits(99, 999), parallel=5, poll=0.01) for _ in range(2)]
        await asyncio.gather(*(runner.finish("c") for runner in runners))

    asyncio.run(both())
    with store.read() as connection:
        batch = batches.get(connection, "c")
        assert batch is not None
        assert (batch.status, batch.total, batch.completed, batch.failed, batch.input_tokens) == (
            "completed",
            60,
            60,
            0,
            120,
        )
        found = [json.loads(text) for _, text in batch_rows.results(connection, "c", ["output", "error"])]
    assert [row["response"]["body"]["text"] for row in found] == [str(n) for n in range(60)]
