"""Files: what was uploaded, in chunks, and the names of what batches write.

A batch's output and error file have no chunks: their content is rendered from the batch's rows whenever it is read, so
a row's result is stored once, and a file that is still growing can be read.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Identity,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    String,
    Table,
    Text,
    delete,
    insert,
    select,
)

from kvern.store.schema import Group

METADATA = MetaData()
NUMBER = BigInteger().with_variant(Integer, "sqlite")
CHUNK_BYTES = 1 << 20

FILES = Table(
    "files",
    METADATA,
    Column("number", NUMBER, Identity(), primary_key=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(256), nullable=False, index=True),
    Column("purpose", String(32), nullable=False),
    Column("filename", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, index=True),
    Column("batch_id", String(64), index=True),
)
CHUNKS = Table(
    "file_chunks",
    METADATA,
    Column("file_id", String(64), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("data", LargeBinary, nullable=False),
)
GROUP = Group("files", METADATA)


@dataclass(frozen=True)
class File:
    """A file. Times are seconds since 1970; `batch_id`: the batch that writes it, None for an upload."""

    id: str
    owner: str
    purpose: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int | None = None
    batch_id: str | None = None


FIELDS = tuple(FILES.c[name] for name in File.__dataclass_fields__)


def new_id() -> str:
    """An id that nobody can guess."""
    return f"file-{secrets.token_hex(12)}"


def add(connection: Connection, file: File) -> None:
    """Note a file."""
    connection.execute(insert(FILES).values(**file.__dict__))


def write(connection: Connection, file_id: str, chunks: Iterable[bytes]) -> None:
    """Store an uploaded file's content."""
    for position, data in enumerate(chunks):
        connection.execute(insert(CHUNKS).values(file_id=file_id, position=position, data=data))


def get(connection: Connection, owner: str, file_id: str, now: int) -> File | None:
    """The owner's file, unless it has expired."""
    row = connection.execute(_of(owner, now).where(FILES.c.id == file_id)).one_or_none()
    return None if row is None else File(**row._mapping)


def page(
    connection: Connection, owner: str, now: int, *, purpose: str | None, after: str | None, limit: int, newest: bool
) -> list[File]:
    """Up to `limit` files in the order of their creation, those behind `after`."""
    number, statement = FILES.c.number, _of(owner, now)
    if purpose is not None:
        statement = statement.where(FILES.c.purpose == purpose)
    if after is not None:
        start = select(number).where(FILES.c.id == after, FILES.c.owner == owner).scalar_subquery()
        statement = statement.where(number < start if newest else number > start)
    ordered = statement.order_by(number.desc() if newest else number).limit(limit)
    return [File(**row._mapping) for row in connection.execute(ordered)]


def chunk(connection: Connection, file_id: str, position: int) -> bytes | None:
    """One part of an uploaded file; None behind the last."""
    chosen = select(CHUNKS.c.data).where(CHUNKS.c.file_id == file_id, CHUNKS.c.position == position)
    data: bytes | None = connection.scalar(chosen)
    return data


def lines(connection: Connection, file_id: str) -> Iterator[bytes]:
    """The lines of an uploaded file, without their ends, in the memory of a chunk and a line."""
    position, rest = 0, b""
    while (data := chunk(connection, file_id, position)) is not None:
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
        position += 1
    if rest:
        yield rest


def remove(connection: Connection, file_id: str) -> None:
    """Forget a file and its content."""
    connection.execute(delete(CHUNKS).where(CHUNKS.c.file_id == file_id))
    connection.execute(delete(FILES).where(FILES.c.id == file_id))


def expired(connection: Connection, now: int) -> list[File]:
    """Files whose time is over and that are still stored."""
    return [File(**row._mapping) for row in connection.execute(select(*FIELDS).where(FILES.c.expires_at <= now))]


def _of(owner: str, now: int) -> Select[*tuple[Any, ...]]:
    fresh = FILES.c.expires_at.is_(None) | (FILES.c.expires_at > now)
    return select(*FIELDS).where(FILES.c.owner == owner, fresh)
