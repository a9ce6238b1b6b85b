"""Responses that may be fetched and continued: each with all the items it was made from, so none depends on another.

A long conversation is therefore stored once a turn; it is packed, which takes most of that back. A response belongs to
an owner; nobody else finds it.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, Column, Connection, LargeBinary, MetaData, String, Table, delete, insert, select

from kvern.store.schema import Group

METADATA = MetaData()
RESPONSES = Table(
    "responses",
    METADATA,
    Column("owner", String(256), primary_key=True),
    Column("id", String(64), primary_key=True),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False, index=True),
    Column("items", LargeBinary, nullable=False),
    Column("response", LargeBinary, nullable=False),
)
GROUP = Group("responses", METADATA)


@dataclass(frozen=True)
class StoredResponse:
    """A response, and the items before its output, as JSON values. Times are seconds since 1970."""

    owner: str
    id: str
    created_at: int
    expires_at: int
    items: list[dict[str, Any]]
    response: dict[str, Any]


def save(connection: Connection, stored: StoredResponse) -> None:
    """Store it, in the place of one of that id."""
    remove(connection, stored.owner, stored.id)
    packed = {"items": _pack(stored.items), "response": _pack(stored.response)}
    connection.execute(insert(RESPONSES).values(**{**stored.__dict__, **packed}))


def get(connection: Connection, owner: str, response_id: str, now: float) -> StoredResponse | None:
    """The owner's response, unless it has expired."""
    found = _is(owner, response_id) & (RESPONSES.c.expires_at > now)
    row = connection.execute(select(RESPONSES).where(found)).one_or_none()
    if row is None:
        return None
    return StoredResponse(row.owner, row.id, row.created_at, row.expires_at, _unpack(row.items), _unpack(row.response))


def remove(connection: Connection, owner: str, response_id: str) -> bool:
    """Forget it; whether it was there."""
    return bool(connection.execute(delete(RESPONSES).where(_is(owner, response_id))).rowcount)


def expire(connection: Connection, now: float) -> int:
    """Forget what has expired; how many those were."""
    return connection.execute(delete(RESPONSES).where(RESPONSES.c.expires_at <= now)).rowcount


def _is(owner: str, response_id: str) -> Any:
    return (RESPONSES.c.owner == owner) & (RESPONSES.c.id == response_id)


def _pack(value: Any) -> bytes:
    return zlib.compress(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(), 1)


def _unpack(data: bytes) -> Any:
    return json.loads(zlib.decompress(data))
