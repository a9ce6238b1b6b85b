"""Batches: their tables, and the statements over a batch as a whole; those over its rows are in `batch_rows`.

    validating -> in_progress -> finalizing -> completed | expired
        |              |-> cancelling -> cancelled
        |-> failed

A batch that leaves a status does so in `move`, which names the statuses it may leave, so two processes never both do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    insert,
    select,
    update,
)

from kvern.store.files import NUMBER
from kvern.store.schema import Group

Status: TypeAlias = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
ENDED: tuple[Status, ...] = ("failed", "completed", "expired", "cancelled")
METADATA = MetaData()

BATCHES = Table(
    "batches",
    METADATA,
    Column("number", NUMBER, Identity(), primary_key=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(256), nullable=False, index=True),
    Column("model", Text, nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("completion_window", String(32), nullable=False),
    Column("tags", JSON(none_as_null=True)),
    Column("output_expires", BigInteger),
    Column("status", String(16), nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("in_progress_at", BigInteger),
    Column("finalizing_at", BigInteger),
    Column("completed_at", BigInteger),
    Column("failed_at", BigInteger),
    Column("expired_at", BigInteger),
    Column("cancelling_at", BigInteger),
    Column("cancelled_at", BigInteger),
    Column("errors", JSON(none_as_null=True)),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("reused", Integer, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
)
ROWS = Table(
    "batch_rows",
    METADATA,
    Column("batch_id", String(64), primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("custom_id", Text, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("prefix", Integer, nullable=False),
    Column("state", SmallInteger, nullable=False),
    Column("request", LargeBinary),
    Column("result", LargeBinary),
)
Index("batch_rows_waiting", ROWS.c.batch_id, ROWS.c.state, ROWS.c.rank)
ANSWERS = Table(
    "batch_answers",
    METADATA,
    Column("key", String(64), primary_key=True),
    Column("body", LargeBinary, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)
GROUP = Group("batches", METADATA)


@dataclass(frozen=True)
class Batch:
    """A batch. Times are seconds since 1970; `tags` is the caller's metadata, `errors` what was wrong with the input.

    output_expires: seconds that its files live from their creation. total, completed, failed, reused: rows, the last
    those answered from the cache of requests.
    """

    id: str
    owner: str
    model: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int | None = None
    tags: dict[str, str] | None = None
    output_expires: int | None = None
    status: Status = "validating"
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    errors: list[dict[str, Any]] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    reused: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


FIELDS = tuple(BATCHES.c[name] for name in Batch.__dataclass_fields__)


def add(connection: Connection, batch: Batch) -> None:
    """Note a new batch."""
    connection.execute(insert(BATCHES).values(**batch.__dict__))


def get(connection: Connection, batch_id: str, owner: str | None = None) -> Batch | None:
    """A batch; with `owner`, only if it is the owner's."""
    statement = select(*FIELDS).where(BATCHES.c.id == batch_id)
    row = connection.execute(statement if owner is None else statement.where(BATCHES.c.owner == owner)).one_or_none()
    return None if row is None else Batch(**row._mapping)


def page(connection: Connection, owner: str, *, after: str | None, limit: int) -> list[Batch]:
    """Up to `limit` batches, newest first, those behind `after`."""
    statement = select(*FIELDS).where(BATCHES.c.owner == owner)
    if after is not None:
        start = select(BATCHES.c.number).where(BATCHES.c.id == after, BATCHES.c.owner == owner).scalar_subquery()
        statement = statement.where(BATCHES.c.number < start)
    return [
        Batch(**row._mapping) for row in connection.execute(statement.order_by(BATCHES.c.number.desc()).limit(limit))
    ]


def open_for(connection: Connection, model: str) -> list[Batch]:
    """The batches of a model that have not ended, oldest first."""
    statement = select(*FIELDS).where(BATCHES.c.status.not_in(ENDED), BATCHES.c.model == model)
    return [Batch(**row._mapping) for row in connection.execute(statement.order_by(BATCHES.c.number))]


def reading(connection: Connection, file_id: str) -> bool:
    """Whether a batch has yet to read the file, or is still writing it."""
    of_file = (BATCHES.c.output_file_id == file_id) | (BATCHES.c.error_file_id == file_id)
    unread = (BATCHES.c.input_file_id == file_id) & (BATCHES.c.status == "validating")
    statement = select(BATCHES.c.id).where((of_file & BATCHES.c.status.not_in(ENDED)) | unread)
    return connection.execute(statement.limit(1)).first() is not None


def move(connection: Connection, batch_id: str, before: Sequence[Status], after: Status, now: int, **more: Any) -> bool:
    """Take a batch from one of `before` to `after`, noting when; False where it was in none of them."""
    chosen = update(BATCHES).where(BATCHES.c.id == batch_id, BATCHES.c.status.in_(before))
    return connection.execute(chosen.values(status=after, **{f"{after}_at": now}, **more)).rowcount == 1
