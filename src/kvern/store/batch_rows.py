"""The rows of batches: every change of a row and of its batch's counts is one transaction.

    row: waiting -> succeeded (its line is in the output file) | failed (in the error file)

Both states that end a row are final: `record` changes a row that waits, and only that, so whoever is second, after a
restart or in another process, changes nothing. The lines of the input are stored as they came; they go when the batch
ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeAlias, TypeVar

from sqlalchemy import Connection, delete, func, insert, select, update

from kvern.store import batches, files
from kvern.store.batches import ANSWERS, BATCHES, FIELDS, ROWS, Batch

WAITING, SUCCEEDED, FAILED = range(3)
PAGE = 500
"""Rows that one statement takes."""

Item = TypeVar("Item")
Part: TypeAlias = Literal["output", "error"]
STATES: dict[Part, int] = {"output": SUCCEEDED, "error": FAILED}


@dataclass(frozen=True)
class Row:
    """A row to compute. `rank` orders the rows as they are to run; those of one `prefix` begin alike."""

    line: int
    custom_id: str
    rank: int
    prefix: int
    request: bytes


@dataclass(frozen=True)
class Tokens:
    """What an answer took. `cached_tokens` are among those of the input, `reasoning_tokens` among the output's."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class Result:
    """What a row's line says in the file of `part`, and what it counts; with a `key`, `body` goes into the cache."""

    line: int
    part: Part
    text: bytes
    reused: int = 0
    tokens: Tokens = Tokens()
    key: str | None = None
    body: bytes = b""


def fill(connection: Connection, batch_id: str, rows: Iterable[Row]) -> None:
    """Store the rows of a batch, in place of any it had."""
    connection.execute(delete(ROWS).where(ROWS.c.batch_id == batch_id))
    for some in _pages(rows):
        values = [{"batch_id": batch_id, "state": WAITING, "result": None, **row.__dict__} for row in some]
        connection.execute(insert(ROWS), values)


def waiting(connection: Connection, batch_id: str) -> list[tuple[int, int]]:
    """(line, prefix) of the rows that wait, in the order in which they are to run."""
    statement = select(ROWS.c.line, ROWS.c.prefix).where(ROWS.c.batch_id == batch_id, ROWS.c.state == WAITING)
    return [(line, prefix) for line, prefix in connection.execute(statement.order_by(ROWS.c.rank))]


def row(connection: Connection, batch_id: str, line: int) -> Row | None:
    """A row that waits; None where it waits no more."""
    fields = [ROWS.c[name] for name in Row.__dataclass_fields__]
    its = ROWS.c.batch_id == batch_id, ROWS.c.line == line, ROWS.c.state == WAITING
    found = connection.execute(select(*fields).where(*its)).one_or_none()
    return None if found is None else Row(**found._mapping)


def answer(connection: Connection, key: str) -> bytes | None:
    """The body that answered an equal request before."""
    body: bytes | None = connection.scalar(select(ANSWERS.c.body).where(ANSWERS.c.key == key))
    return body


def record(connection: Connection, batch_id: str, result: Result, now: int) -> bool:
    """End a row: its line, its batch's counts, its file's size, the cache. False, and nothing, where it had ended."""
    if not _end(connection, batch_id, result.line, STATES[result.part], result.text):
        return False
    counted = {"reused": result.reused, **result.tokens.__dict__}
    counts = {name: BATCHES.c[name] + count for name, count in counted.items()}
    _count(connection, batch_id, result.part, 1, len(result.text) + 1, now, counts)
    if result.key is not None and answer(connection, result.key) is None:
        connection.execute(insert(ANSWERS).values(key=result.key, body=result.body, created_at=now))
    return True


def fail_rest(connection: Connection, batch_id: str, texts: Iterable[tuple[int, bytes]], now: int) -> None:
    """End rows that wait, (line, text) each, as failed."""
    for some in _pages(texts):
        ended = [len(text) + 1 for line, text in some if _end(connection, batch_id, line, FAILED, text)]
        if ended:
            _count(connection, batch_id, "error", len(ended), sum(ended), now, {})


def names(connection: Connection, batch_id: str) -> list[tuple[int, str]]:
    """(line, custom_id) of the rows that wait, in the order of the input."""
    statement = select(ROWS.c.line, ROWS.c.custom_id).where(ROWS.c.batch_id == batch_id, ROWS.c.state == WAITING)
    return [(line, custom_id) for line, custom_id in connection.execute(statement.order_by(ROWS.c.line))]


def results(
    connection: Connection, batch_id: str, parts: Sequence[Part], after: int = 0, limit: int = PAGE
) -> list[tuple[int, bytes]]:
    """(line, text) of up to `limit` rows of those files, in the order of the input, behind line `after`."""
    states = [STATES[part] for part in parts]
    statement = select(ROWS.c.line, ROWS.c.result).where(
        ROWS.c.batch_id == batch_id, ROWS.c.state.in_(states), ROWS.c.line > after
    )
    return [(line, text) for line, text in connection.execute(statement.order_by(ROWS.c.line).limit(limit))]


def forget_requests(connection: Connection, batch_id: str) -> None:
    """Drop the lines of the input."""
    connection.execute(update(ROWS).where(ROWS.c.batch_id == batch_id).values(request=None))


def forget_results(connection: Connection, batch_id: str, part: Part) -> None:
    """Drop what a file of the batch holds."""
    connection.execute(delete(ROWS).where(ROWS.c.batch_id == batch_id, ROWS.c.state == STATES[part]))


def remove_file(connection: Connection, file: files.File) -> None:
    """Forget a file; of one that a batch wrote, the results."""
    if file.batch_id is not None:
        batch = batches.get(connection, file.batch_id)
        assert batch is not None
        forget_results(connection, file.batch_id, "output" if batch.output_file_id == file.id else "error")
    files.remove(connection, file.id)


def trim_answers(connection: Connection, most: int) -> None:
    """Keep the newest answers of the cache."""
    if (connection.scalar(select(func.count()).select_from(ANSWERS)) or 0) > most:
        newest = select(ANSWERS.c.key).order_by(ANSWERS.c.created_at.desc(), ANSWERS.c.key).limit(most)
        connection.execute(delete(ANSWERS).where(ANSWERS.c.key.not_in(newest.scalar_subquery())))


def _end(connection: Connection, batch_id: str, line: int, state: int, text: bytes) -> bool:
    """The one place where a row ends; False where it had ended before."""
    chosen = update(ROWS).where(ROWS.c.batch_id == batch_id, ROWS.c.line == line, ROWS.c.state == WAITING)
    return connection.execute(chosen.values(state=state, result=text)).rowcount == 1


def _count(
    connection: Connection, batch_id: str, part: Part, rows: int, size: int, now: int, counts: dict[str, object]
) -> None:
    """Add rows to a batch's counts and to its file, which begins with the first of them."""
    name = "completed" if part == "output" else "failed"
    changed = update(BATCHES).where(BATCHES.c.id == batch_id).values({name: BATCHES.c[name] + rows, **counts})
    batch = Batch(**connection.execute(changed.returning(*FIELDS)).one()._mapping)
    file_id = batch.output_file_id if part == "output" else batch.error_file_id
    if file_id is None:
        file_id = files.new_id()
        connection.execute(update(BATCHES).where(BATCHES.c.id == batch_id).values({f"{part}_file_id": file_id}))
        files.add(connection, _file(batch, part, file_id, now))
    grown = update(files.FILES).where(files.FILES.c.id == file_id)
    connection.execute(grown.values(bytes=files.FILES.c.bytes + size))


def _pages(items: Iterable[Item]) -> Iterator[list[Item]]:
    rest = iter(items)
    while some := list(islice(rest, PAGE)):
        yield some


def _file(batch: Batch, part: Part, file_id: str, now: int) -> files.File:
    expires_at = None if batch.output_expires is None else now + batch.output_expires
    return files.File(file_id, batch.owner, "batch_output", f"{batch.id}_{part}.jsonl", 0, now, expires_at, batch.id)
